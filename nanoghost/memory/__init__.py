"""Personal memory: a chat model remembers what a person wrote, without the text in its context.

    chat log ──extract──► facts ──synthesize──► questions and answers ──train──► LoRA adapter ──acceptance test──► use

`nanoghost sleep` runs these steps once; one such run is called a night. `nanoghost memory` shows and changes the facts.

    store.py            Person: chat log, facts, adapter
    extract.py          fact extraction by an adapter that is trained on extractor_data.py
    synthesize.py       questions about the facts, in the phrasings of phrasings.py
    teacher.py          the base model answers them with the facts in view, and provides targets
    train_adapter.py    LoRA training
    acceptance.py     whether the new adapter replaces the old one
    router.py           which messages the adapter answers
    consolidate.py      a night, step by step: START READING HERE
"""
