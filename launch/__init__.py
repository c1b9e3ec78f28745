"""Commands, and what they share. Not part of the installed package."""
