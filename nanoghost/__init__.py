"""nanoghost: from an empty folder to a chat model of your own."""

__version__ = "0.1.0"
