"""Everything that runs inside a container: libraries (nouns) and steps (verbs)."""
