"""Names that several tasks share, so that "How many a in Paris?" stands beside "How many people live in Paris?"."""

from nanoghost.tasks.base import phrases

PLACES, FIRST_NAMES, SURNAMES = (phrases("names")[key] for key in ("places", "first_names", "surnames"))
