"""To say "I don't know" when one can't know, and only then.

A model that has read nothing but plays can't know the weather, the news or where your keys are. It learns to say so
from many kinds of questions, each with its reason. Many stand close to questions it can answer: "What is my name?"
beside "What is your name?", "How many people live in Paris?" beside "How many letters a in Paris?". Two measures belong
together: how often it refuses what it can't know (`Refusal`), how often it doesn't refuse what it can (`Answerable`).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanoghost.tasks.base import Problem, Task, assistant, final_text, split_of, user, wording
from nanoghost.tasks.names import FIRST_NAMES, PLACES, SURNAMES
from nanoghost.tasks.spelling import quoted

SLOTS: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "first": FIRST_NAMES,
    "last": SURNAMES,
    "number": tuple(str(n) for n in range(2, 60)),
    "day": ("today", "tomorrow", "tonight", "on Monday", "on Sunday", "this week", "next week", "this evening",
            "on Friday",
            "this morning", "at the weekend", "next month", "on Thursday", "this afternoon", "on Saturday"),
    "past": ("yesterday", "last night", "last week", "this morning", "on Monday", "last year", "on Friday",
             "a week ago",
             "two days ago", "last month", "on Sunday"),
    "sport": ("football", "tennis", "hockey", "chess", "basketball", "cricket", "rugby", "boxing", "golf",
              "baseball"),
    "team": ("Arsenal", "Real Madrid", "the Lakers", "Liverpool", "Brazil", "the Yankees", "Bayern", "Chelsea",
             "Barcelona",
             "the Giants", "Italy", "the Bulls", "our team", "the red team"),
    "goods": ("bread", "milk", "gold", "coffee", "petrol", "a horse", "a car", "a phone", "a ticket to {place}",
              "a house",
              "silver", "sugar", "an apple", "a new coat", "a laptop", "rice", "a bicycle", "butter", "a ring",
              "a bed"),
    "things": ("apples", "eggs", "pounds of sugar", "loaves", "tickets", "shirts", "bottles of wine", "books",
               "chairs"),
    "owned": ("keys", "phone", "glasses", "wallet", "book", "hat", "shoes", "ring", "bag", "umbrella", "coat", "cat",
              "car",
              "passport", "gloves", "watch", "dog", "bicycle", "letter", "purse"),
    "relative": ("sister", "brother", "mother", "father", "wife", "husband", "cousin", "uncle", "aunt", "friend",
                 "teacher",
                 "neighbour", "son", "daughter", "grandmother", "boss", "nephew", "doctor"),
    "favourite": ("colour", "food", "song", "book", "film", "animal", "game", "drink", "city", "season", "number"),
    "star": ("Tom Hanks", "Taylor Swift", "Elon Musk", "the Pope", "Madonna", "Einstein", "Mozart", "Messi",
             "Beyonce", "Napoleon",
             "Picasso", "Obama", "Newton", "Lincoln", "Elvis", "Marie Curie", "Darwin", "Beethoven"),
    "book": ("Moby Dick", "Don Quixote", "Emma", "War and Peace", "Dracula", "Frankenstein", "the Iliad", "Faust",
             "Jane Eyre",
             "Oliver Twist", "Treasure Island", "Ulysses", "The Hobbit", "Robinson Crusoe"),
    "invention": ("the telephone", "the radio", "the train", "the computer", "the light bulb", "the aeroplane",
                  "paper", "glass",
                  "the internet", "the clock", "the bicycle", "penicillin"),
    "matter": ("electricity", "gravity", "an atom", "a virus", "a black hole", "DNA", "a volcano", "algebra",
               "inflation", "a comet",
               "photosynthesis", "an engine", "a glacier", "democracy"),
    "beast": ("an elephant", "a whale", "a tiger", "a snail", "a penguin", "a cow", "a spider", "a shark", "an owl",
              "a bee"),
    "language": ("French", "Spanish", "Latin", "German", "Greek", "Chinese", "Arabic", "Italian", "Dutch", "Russian",
                 "Polish"),
    "word": ("house", "love", "bread", "water", "night", "friend", "king", "thank you", "good morning", "sword",
             "ghost", "sun",
             "heart", "dream", "goodbye", "moon"),
    "dish": ("bread", "a cake", "soup", "pancakes", "pizza", "rice", "an omelette", "a pie", "pasta", "a stew",
             "cheese", "jam"),
    "device": ("my car", "a bicycle", "my phone", "the radio", "a clock", "a lamp", "the door", "my computer",
               "a chair", "the roof",
               "the heating", "a printer"),
    "errand": ("order a pizza", "book a flight to {place}", "call my {relative}", "send an email", "play some music",
               "set an alarm",
               "open the window", "buy me a coat", "turn on the light", "print this page", "take a picture",
               "book a table",
               "write to {first}", "pay my bill", "draw a cat", "call a taxi"),
    "shop": ("the bakery", "the bank", "the library", "the post office", "the museum", "the market", "the school",
             "the station",
             "the theatre", "the town hall"),
    "vehicle": ("train", "bus", "flight", "ship", "ferry", "coach", "tram"),
    "illness": ("a headache", "a fever", "a cough", "a bad knee", "a sore throat", "a rash", "a toothache", "a cold",
                "back pain"),
    "account": ("email", "bank card", "computer", "wifi", "phone", "door", "account", "safe"),
}  # fmt: skip


@dataclass(frozen=True)
class Category:
    topic: str
    """What the model doesn't know, after "I don't know"."""
    reason: str
    train: tuple[str, ...]
    test: tuple[str, ...]


CATEGORIES: dict[str, Category] = {
    "weather": Category(
        "the weather",
        "I cannot look outside",
        (
            "What is the weather in {place}?", "Will it rain {day}?", "Is it cold in {place}?",
            "How warm is it in {place}?",
            "Is it snowing in {place} {day}?", "What will the weather be {day}?", "Do I need an umbrella {day}?",
            "Is it raining?",
            "How is the weather?", "Is the sun shining in {place}?", "How much did it rain in {place} {past}?",
            "What is the temperature in {place}?", "Is there a storm coming {day}?", "Should I take a coat {day}?",
        ),
        ("What's the weather like {day}?", "Will it be sunny in {place} {day}?", "How hot is it outside?",
         "Is it windy in {place}?"),
    ),
    "news": Category(
        "the news",
        "I have only read {read}",
        (
            "What is the news {day}?", "What is new in {place}?", "What happened in {place} {past}?",
            "Who won the election in {place}?",
            "Who is the president of {place}?", "Tell me the latest news.", "What did the papers say {past}?",
            "What happened {past}?", "Who is the prime minister of {place}?", "Is there a war in {place}?",
            "What is in the paper {day}?",
            "Who rules {place} now?", "What is going on in {place}?",
        ),
        ("Any news from {place}?", "What are the headlines {day}?", "Who leads {place} now?",
         "What happened in the world {past}?"),
    ),
    "sport": Category(
        "the result",
        "I see no games",
        (
            "Who won the {sport} game {past}?", "Did {team} win {past}?", "What was the score of {team} {past}?",
            "Who plays {team} {day}?",
            "Who is the best at {sport}?", "How did {team} play {past}?", "When does {team} play?",
            "Who won the world cup?",
            "How many goals did {team} score {past}?", "Who lost the {sport} match {past}?",
            "Who is first in the league?",
            "Did anyone beat {team} {past}?", "Who scored for {team}?",
        ),
        ("What was the {sport} score {past}?", "Has {team} won {past}?", "Which team won the {sport} cup?",
         "How many points did {team} get {past}?"),
    ),
    "prices": Category(
        "prices",
        "I see no market",
        (
            "How much is {goods}?", "What does {goods} cost?", "What is the price of {goods}?",
            "How much do {number} {things} cost?",
            "How much is {goods} in {place}?", "Is {goods} dear in {place}?",
            "What is the price of {number} {things}?",
            "How much are {number} {things}?", "What do I pay for {goods}?", "Where is {goods} cheapest?",
            "How high is the rent in {place}?",
            "What is a share of the bank worth?", "How is the stock market {day}?",
            "How much is the dollar worth {day}?",
            "What does {first} earn?",
        ),
        ("How much does {goods} cost in {place}?", "What would {number} {things} cost me?", "Is {goods} expensive?",
         "What is today's price of {goods}?"),
    ),
    "user": Category(
        "that about you",
        "you have not told me",
        (
            "What is my name?", "What's my name?", "How old am I?", "Where do I live?", "When is my birthday?",
            "What did I eat {past}?",
            "Who am I?", "Where was I born?", "What is my favourite {favourite}?", "What did I do {past}?",
            "Where did I go {past}?",
            "How tall am I?", "What colour are my eyes?", "Where do I work?", "What is my job?",
            "What am I thinking of?",
            "How much money do I have?", "What do I like?", "What did I dream {past}?",
            "How many parameters do I have?",
            "What am I called?", "What is my age?", "What have I read {past}?", "How did I sleep?", "Who do I love?",
            "What have I bought {past}?", "Am I married?",
        ),
        (
            "Do you know my name?", "How many years old am I?", "In which town do I live?",
            "What did I have for dinner {past}?",
            "When was I born?", "Whom did I meet {past}?", "What is my favourite {favourite} of all?",
        ),
    ),
    "family": Category(
        "your people",
        "you have not told me of them",
        (
            "What is my {relative}'s name?", "How old is my {relative}?", "Where does my {relative} live?",
            "When is my {relative}'s birthday?",
            "What is the name of my {relative}?", "How many brothers do I have?", "How many children do I have?",
            "Is my {relative} well?",
            "What does my {relative} like?", "What did my {relative} say {past}?", "Where is my {relative}?",
            "Who is my {relative}?",
            "How many sisters does my {relative} have?", "Does my {relative} love me?",
            "What does my {relative} think of me?",
            "What is my dog called?",
        ),
        ("What do they call my {relative}?", "How tall is my {relative}?", "Where was my {relative} born?",
         "What will my {relative} do {day}?"),
    ),
    "lost": Category(
        "where it is",
        "I cannot see your house",
        (
            "Where are my {owned}?", "Where is my {owned}?", "Have you seen my {owned}?",
            "Where did I put my {owned}?",
            "Who took my {owned}?", "I lost my {owned}. Where is it?", "Where did I leave my {owned} {past}?",
            "Who has my {owned}?",
            "Is my {owned} in the car?", "Is my {owned} at home?", "What colour is my {owned}?",
            "What is in my {owned}?",
            "Did I leave my {owned} at {first}'s?",
        ),
        ("Can you find my {owned}?", "In which room is my {owned}?", "Do you know where my {owned} is?",
         "Where could my {owned} be?"),
    ),
    "future": Category(
        "the future",
        "nobody can see it",
        (
            "Who will win {day}?", "Will I be rich?", "What will happen {day}?", "When will I die?",
            "Will {team} win {day}?",
            "Will I find love?", "What will I be in {number} years?", "Will {first} marry me?",
            "Who will be king of {place}?",
            "Will my {relative} come {day}?", "How long will I live?", "What number will win the lottery?",
            "Will there be a war?",
            "What will the world be in {number} years?", "Shall I be happy?", "How will it end?",
        ),
        ("What does the future hold?", "Will I be famous in {number} years?", "Who will win the race {day}?",
         "Will {first} come back {day}?"),
    ),
    "contact": Category(
        "addresses or numbers",
        "I keep no such book",
        (
            "What is {first}'s phone number?", "Where does {first} {last} live?",
            "What is the address of {first} {last}?",
            "What is the number of the police in {place}?", "What is my phone number?", "What is {first}'s email?",
            "How can I reach {first} {last}?", "Give me the number of {shop}.",
            "What is the address of {shop} in {place}?",
            "In which street does {first} live?", "What is my address?", "What number must I call for {shop}?",
            "In which house does {first} {last} live?",
        ),
        ("How do I call {first} {last}?", "Do you have {first}'s number?", "What street is {shop} in?",
         "What is the email of {first} {last}?"),
    ),
    "clock": Category(
        "the time or the date",
        "I have no clock",
        (
            "What time is it?", "What is the time?", "What day is it?", "What is the date {day}?", "What year is it?",
            "What time is it in {place}?",
            "What month is it?", "Is it morning or evening?", "Is it late?", "How late is it?",
            "What day was it {past}?",
            "How many days until Christmas?", "When is Easter?", "Is it {number} minutes past yet?",
            "What date is it?",
            "When does the sun set {day}?", "How long have we talked?",
        ),
        ("Do you have the time?", "Which day of the week is it?", "What is today's date?", "Is it night in {place}?"),
    ),
    "seeing": Category(
        "what is around you",
        "I cannot see or hear",
        (
            "What am I wearing?", "What colour is my shirt?", "What do you see?", "Who is in the room?",
            "What is behind me?",
            "What is on my table?", "What do you hear?", "How many fingers am I holding up?", "What is in my hand?",
            "What is in this picture?",
            "Who is at the door?", "Do you see me?", "How do I look?", "What is that noise?",
            "How many people are in my room?",
            "What is on the wall?", "Who is beside me?",
        ),
        ("Can you see me?", "What have I got in my pocket?", "What is outside my window?",
         "How many chairs are in my room?"),
    ),
    "world": Category(
        "the wide world",
        "I have only read {read}",
        (
            "How many people live in {place}?", "What is the capital of {place}?", "How far is {place} from {place}?",
            "How big is {place}?",
            "Which river runs through {place}?", "Where is {place}?", "What language do they speak in {place}?",
            "How old is {place}?",
            "What is the highest mountain in {place}?", "How many towns are in {place}?",
            "What money do they use in {place}?",
            "What is {place} known for?", "How many islands has {place}?", "Is {place} bigger than {place}?",
            "What is the flag of {place}?",
            "What do they eat in {place}?", "How do I get to {place}?",
        ),
        ("What is the population of {place}?", "How many people are in {place}?",
         "What city is the capital of {place}?",
         "How long is the way from {place} to {place}?"),
    ),
    "famous": Category(
        "that person",
        "I have only read {read}",
        (
            "How old is {star}?", "Who is {star}?", "When was {star} born?", "Is {star} married?",
            "How rich is {star}?", "Where does {star} live?",
            "Who wrote {book}?", "What did {star} do?", "When did {star} die?", "Who is the author of {book}?",
            "How tall is {star}?",
            "Who is the wife of {star}?", "What is {star} famous for?", "Who painted the Mona Lisa?",
            "Who sang with {star}?",
            "Whose book is {book}?",
        ),
        ("What is the age of {star}?", "Who was {star}?", "By whom was {book} written?",
         "How many children has {star}?"),
    ),
    "stranger": Category(
        "that person",
        "we have never met",
        (
            "Who is {first} {last}?", "How old is {first} {last}?", "What is {first} {last}'s favourite {favourite}?",
            "Is {first} at home?",
            "What did {first} {last} do {past}?", "Where is {first}?", "What does {first} {last} like?",
            "Is {first} {last} married?",
            "Why is {first} angry?", "How many {things} has {first} {last}?", "What is {first} doing {day}?",
            "Does {first} like me?",
            "What is {first} {last}'s job?", "Did {first} call {past}?", "Who is the {relative} of {first} {last}?",
        ),
        ("Do you know {first} {last}?", "What is {first}'s favourite {favourite}?",
         "Where was {first} {last} {past}?", "How many children has {first} {last}?"),
    ),
    "learning": Category(
        "such things",
        "I have only read {read}",
        (
            "Who invented {invention}?", "When was {invention} invented?", "What is {matter}?",
            "How does {matter} work?", "Explain {matter}.",
            "How heavy is {beast}?", "How long does {beast} live?", "What does {beast} eat?", "How far is the moon?",
            "How hot is the sun?",
            "Why is the sky blue?", "How many bones are in the body?", "How many legs has {beast}?",
            "How deep is the sea?", "What is {matter} made of?",
            "In what year did the war end?", "How fast is light?", "How big is {beast}?", "How many stars are there?",
            "What causes {matter}?",
            "How many planets are there?",
        ),
        ("What makes {matter} work?", "Who was the inventor of {invention}?", "How fast does {beast} run?",
         "How old is the earth?",
         "What exactly is {matter}?"),
    ),
    "language": Category(
        "that",
        "I speak only English and I am no dictionary",
        (
            "How do you say {word} in {language}?", "What does {word} mean?",
            "Translate {word} into {language}.",
            "What is {word} in {language}?", "Do you speak {language}?",
            "What is the {language} word for {word}?",
            "How is {word} written in {language}?", "What is the meaning of {word}?",
            "Say {word} in {language}.",
            "Where does the word {word} come from?", "Which word rhymes with {word}?",
            "What is the opposite of {word}?",
            "Say something in {language}.",
        ),
        ("How would one say {word} in {language}?", "Can you translate {word} to {language}?",
         "What's {word} in {language}?",
         "Can you speak {language}?"),
    ),
    "how_to": Category(
        "how to do that",
        "I have only read {read}",
        (
            "How do you make {dish}?", "How do I cook {dish}?", "How do I repair {device}?",
            "How can I fix {device}?", "How long must I bake {dish}?",
            "What do I need for {dish}?", "Give me a recipe for {dish}.", "How do I learn {language}?",
            "How do I clean {device}?",
            "How do I play {sport}?", "How many eggs do I need for {dish}?", "How can I get rich?",
            "How do I paint {device}?", "How do I build a house?",
            "Why does {device} not work?", "How do I tie a knot?", "How do I write a program?",
            "How do I grow roses?",
        ),
        ("How should I cook {dish}?", "What is the recipe of {dish}?", "Tell me how to repair {device}.",
         "How does one play {sport}?"),
    ),
    "errand": Category(
        "how to do that",
        "I can only talk",
        (
            "Can you {errand}?", "Please {errand}.", "I want you to {errand}.", "Could you {errand} {day}?",
            "{errand} for me, please.",
            "Will you {errand}?", "You must {errand}.", "Go and {errand}.", "Would you please {errand}?",
            "I need you to {errand} {day}.",
            "Help me to {errand}.", "Can you go to {place}?",
        ),
        ("Could you please {errand}?", "Are you able to {errand}?", "I'd like you to {errand} {day}."),
    ),
    "advice": Category(
        "what is best for you",
        "you must ask someone who knows",
        (
            "I have {illness}. What shall I take?", "What helps against {illness}?", "Is {illness} dangerous?",
            "Should I see a doctor for {illness}?",
            "Should I marry {first}?", "Should I buy {goods}?", "Which bank is the best?", "What should I study?",
            "Must I pay the fine?",
            "Should I move to {place}?", "Should I sell my {owned}?", "How many pills may I take?",
            "What shall I eat {day}?",
            "Shall I leave my {relative}?", "What shall I give my {relative}?", "Why do I have {illness}?",
            "Where should I put my money?",
        ),
        ("What can I do about {illness}?", "Is it wise to buy {goods}?", "Should I forgive {first}?",
         "Where shall I go {day}?"),
    ),
    "secrets": Category(
        "any secrets",
        "nobody told me one",
        (
            "What is my password?", "What is the password of my {account}?", "What is the code of my {account}?",
            "Who has read my letters?",
            "What is {first}'s password?", "What is the secret of {first}?", "What did {first} tell {first}?",
            "Who told {first}?",
            "What is in the box?", "What is in the letter?", "Who stole the {owned}?", "What is my {account} code?",
            "Which number opens my {account}?", "What is {first} hiding?", "What does {first} {last} think?",
        ),
        ("Do you know my {account} password?", "How do I open {first}'s {account}?",
         "What secret does {first} {last} keep?"),
    ),
    "hours": Category(
        "that",
        "I have no timetable",
        (
            "When does {shop} open?", "When does {shop} close {day}?", "Is {shop} open {day}?",
            "When does the {vehicle} to {place} leave?",
            "When does the next {vehicle} go?", "How long does the {vehicle} to {place} take?", "Where is {shop}?",
            "Is there a {vehicle} to {place} {day}?",
            "Is the {vehicle} late?", "Which {vehicle} goes to {place}?", "When does the concert begin?",
            "What is on at the cinema {day}?",
            "Where can I eat in {place}?", "Is there a good inn in {place}?", "Where is the next {shop}?",
        ),
        ("At what time does {shop} close?", "What {vehicle} should I take to {place}?",
         "Is {shop} in {place} open {day}?",
         "How often does the {vehicle} go to {place}?"),
    ),
}  # fmt: skip

ANSWERS = ("I don't know {topic}: {reason}.", "I don't know {topic}. {sentence}.")


def is_refusal(text: str) -> bool:
    """Whether a text begins by saying that the speaker doesn't know."""
    return re.match(r"\W*i (?:don['’]t|do not|can['’]?t|cannot) (?:know|tell)\b", text, re.IGNORECASE) is not None


class Refusal:
    """Questions nobody could answer from where the model sits. Right means: it says that it doesn't know."""

    name = "refusal"

    def __init__(self, read: str = "old plays"):
        self.read = read
        """What the model has read, as it says of itself."""

    def problem(self, rng: random.Random, split: str) -> Problem:
        category = rng.choice(list(CATEGORIES.values()))
        template = wording(rng, category.train if split == "train" else category.test, split)
        question = fill(rng, template, split)
        if template.startswith("{"):
            question = question[0].upper() + question[1:]
        reason = category.reason.format(read=self.read)
        sentence = reason[0].upper() + reason[1:]
        answer = rng.choice(ANSWERS).format(topic=category.topic, reason=reason, sentence=sentence)
        return Problem(self.name, (user(question),), (assistant(answer),), "I don't know")

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(is_refusal(final_text(reply)))


def fill(rng: random.Random, template: str, split: str) -> str:
    """Fill the slots of a template, also those inside fillers. Held-out fillers appear in test only; about half of
    the test's fillers are held out, the others are known."""
    while slot := re.search(r"{(\w+)}", template):
        known = [filler for filler in SLOTS[slot[1]] if split_of(filler) == "train"]
        held_out = [filler for filler in SLOTS[slot[1]] if split_of(filler) == "test"]
        use = held_out if split == "test" and held_out and rng.random() < 0.5 else known
        filler = rng.choice(use)
        if slot[1] == "word":
            filler = quoted(rng, filler)  # as in "How do you spell ...?"
        template = template[: slot.start()] + filler + template[slot.end() :]
    return template


class Answerable:
    """What the other tasks ask, only to see that it isn't refused: 1 minus the score is over-refusal."""

    name = "answerable"

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = tasks

    def problem(self, rng: random.Random, split: str) -> Problem:
        problem = rng.choice(self.tasks).problem(rng, split)
        return Problem(self.name, problem.messages, problem.lesson, "")

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        said = final_text(reply)
        return float(said != "" and not is_refusal(said))
