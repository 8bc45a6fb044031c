"""Personal memory: a chat model remembers what a person wrote, without the text in its context.

    chat log --extract--> facts --synthesize--> questions and answers --train--> LoRA adapter --accept--> in use

`nanoghost sleep` runs these steps once; one such run is called a night. `nanoghost memory` shows and changes the facts.

    night.py            a night, step by step: START READING HERE
    store.py            Person: chat log, facts, adapter
    extract.py          fact extraction by an adapter that is trained on extractor_data.py
    synthesize.py       questions about the facts, in the phrasings of phrasings.py
    teacher.py          the base model answers them with the facts in its context, and provides targets
    train_adapter.py    LoRA training, with the settings of recipe.py
    acceptance.py       whether the new adapter replaces the old one
    router.py           which messages the adapter answers
    answers.py          greedy answers of base model, adapter and router together
    night_record.py     what a night has done so far (night.json), and night_report.py its HTML report

The commands are in sleep_command.py and memory_command.py.
"""
