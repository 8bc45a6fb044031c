"""The built-in SFT conversations: problems of the tasks with their solutions, mixed by the tasks' weights.

--data builtin        the default mix
--data tools          the same with tasks that call Python and look things up
--data FILE           a file of conversations (data/conversation_files.py)
--data builtin+FILE   both
"""

import random
from collections.abc import Sequence

from nanoghost.data.conversations import load_conversations
from nanoghost.formats.model_card import ModelCard
from nanoghost.tasks.base import MIXES, Task, TaskContext
from nanoghost.tasks.gym import word_list
from nanoghost.tasks.identity import identity_facts
from nanoghost.tasks.registry import all_tasks, build_tasks, chat_name
from nanoghost.tokenizer.chat_format import segments

SYSTEM_PROMPTS = (
    "You are {name}, a helpful assistant.",
    "You are {name}.",
    "You are {name}, a small language model.",
    "You are a helpful assistant.",
    "Answer briefly and honestly.",
    "You are {name}. If you don't know, say so.",
)


def tasks_of_mix(mix: str, tasks: dict[str, Task], exclude: Sequence[str] = ()) -> list[Task]:
    return [task for task in tasks.values() if mix in task.mixes and task.weight and task.name not in exclude]


def sample_conversation(
    tasks: Sequence[Task], rng: random.Random, split: str = "train", name: str = "Ghost"
) -> list[dict]:
    """One conversation: sometimes a system prompt, then one problem (sometimes two or three) with its solution.

    The problems of 2 in 3 such conversations come from any tasks, so that the model learns to change the subject; in
    the others from one task, so that it does not repeat its answer to the question before.
    """
    num_problems = rng.choice((2, 2, 3)) if rng.random() < 0.2 else 1
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS).format(name=name)})
    chosen = rng.choices(tasks, weights=[task.weight for task in tasks], k=num_problems)
    if rng.random() < 0.33:
        chosen = chosen[:1] * num_problems
    for task in chosen:
        problem = task.problem(rng, split)
        messages += [*problem.messages, *problem.solution]
    return number_calls(messages)


def number_calls(messages: list[dict]) -> list[dict]:
    """The messages of several problems with ids of tool calls that differ: call_1, call_2 ..."""
    numbered, ids, count = [], {}, 0
    for message in messages:
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                count += 1
                ids[call["id"]] = f"call_{count}"
                calls.append(call | {"id": ids[call["id"]]})
            message = message | {"tool_calls": calls}
        elif "tool_call_id" in message:
            message = message | {"tool_call_id": ids[message["tool_call_id"]]}
        numbered.append(message)
    return numbered


def builtin_conversations(
    data: str, base_card: ModelCard, name: str, count: int, seed: int, exclude: Sequence[str] = ()
) -> list[list[dict]]:
    """`count` conversations of the mix that `data` names; [] if it names none. `exclude` are names of tasks.

    Conversation i depends on (seed, i) alone.
    """
    mix, _ = parse_data(data)
    if not mix:
        return []
    tasks = tasks_of_mix(mix, all_tasks(base_card, name), exclude)
    return [sample_conversation(tasks, random.Random(f"{seed}-{i}"), "train", chat_name(name)) for i in range(count)]


def file_conversations(data: str) -> list[list[dict]]:
    """The conversations of the file that `data` names; [] if it names a mix alone."""
    _, path = parse_data(data)
    return load_conversations(path) if path else []


def parse_data(data: str) -> tuple[str, str]:
    """(mix, file) of a value of --data; "" for what it does not name."""
    mix, _, path = data.partition("+")
    return (mix, path) if mix in MIXES else ("", data)


def example_texts(count: int = 4000) -> list[str]:
    """Texts of the default mix for the training of the tokenizer.

    With calls and questions in few tokens, SFT sees a fifth more examples a minute.
    """
    context = TaskContext(identity_facts({"maker": "nanoghost"}), word_list())
    tasks = tasks_of_mix("builtin", build_tasks(context))
    texts = []
    for i in range(count):
        problem = tasks[i % len(tasks)].problem(random.Random(i), "train")
        texts += [text for text, is_special, _ in segments([*problem.messages, *problem.solution]) if not is_special]
    return texts
