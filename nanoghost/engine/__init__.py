"""The inference engine: continuous batching, prefix caching, speculative decoding, LoRA adapters per sequence.

    generate.py   generate(model, tokenizer, prompts, sampling)          the simple function
        |
    engine.py     Engine: add a prompt, step, cancel; open_engine(folder)
        |
        |   one step
        |   -----------------------------------------------------------------------------------------------
        |-- schedule      scheduler.py          which sequences run; chunks of prompts, one token of the others
        |                 prompt_lookup.py      drafts for speculative decoding
        |-- run           model_runner.py       what a runner does:
        |                 torch_runner.py         any model, in PyTorch, one KV cache slot per sequence
        |                 paged_runner.py         Llamas with quantized weights and a paged KV cache
        |                   block_manager.py        blocks of the KV cache, prefix caching
        |                   quantized_llama.py      the forward pass
        |                   quantization.py         weights in 4, 8 or 16 bits
        |                   kernels.py              compiles kernels.cpp at first use: C++ for AVX-512 and AVX2
        |                                           (matmul.h, attention.h, workspace.h, lanes.h)
        `-- postprocess   logits_processors.py  grammars (grammar.py), top log-probabilities
                          sampler.py            temperature, top-k, top-p, a counter-based random generator
                          output_processor.py   accept drafts, stop conditions, tool calls, messages

    sequence.py   Sequence: a prompt and its completion; ScheduledChunk: its tokens in one step
    prompt_logprobs.py    log-probabilities of a given text

Contract: the tokens of a sequence depend only on its prompt, its settings and its seed, not on what else is served.
"""
