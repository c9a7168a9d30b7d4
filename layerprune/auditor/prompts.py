"""The fixed prompts of the generation check: open questions of several kinds, none with a short answer."""

from __future__ import annotations

PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Describe how bread is made, from the field to the table.",
    "Tell a short story about a lighthouse keeper who finds a letter in a bottle.",
    "What should a visitor know before walking in the mountains in winter?",
    "Write a friendly message that invites a neighbour to dinner on Saturday.",
    "Name some differences between a river and a lake, and explain each of them.",
    "Give advice to somebody who starts a new job next week.",
    "Describe a busy market in the morning, with its sounds and smells.",
    "How does a bicycle stay upright while it is moving?",
    "Summarise what happens to water when it is heated from ice to steam.",
    "Write a Python function that counts the vowels in a text, and explain it.",
    "Discuss the advantages and disadvantages of living in a big city.",
)
