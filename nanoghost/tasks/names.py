"""Names that several tasks share, so that a name does not give the task away: "How many a in Paris?" (counting) and
"How many people live in Paris?" (refusal)."""

from nanoghost.tasks.wording import load_phrases

PLACES = load_phrases("names")["places"]
FIRST_NAMES = load_phrases("names")["first_names"]
SURNAMES = load_phrases("names")["surnames"]
