"""Instructions to have a chat model write its own training text with: forms times subjects, and others held out.

`python -m hybrid.training.tasks.prompts train` writes them as JSONL, a conversation a line, in an order in which any
beginning has seen most forms and subjects; `held-out` writes questions that share no form with those. `python` and
`held-out-python` write the beginnings of files of Python's standard library, and of files held out.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from hybrid.training.tasks.stdlib import Document, load_stdlib

LINES, STRIDE = 6, 250  # of an excerpt, and from one to the next

FORMS = (
    "What is {}?", "Explain {} to a child.", "Explain {} in one paragraph.", "Write a short story about {}.",
    "Write a poem about {}.", "Give me three facts about {}.", "Give me five tips about {}.",
    "What are the advantages and disadvantages of {}?", "Write an email to a colleague about {}.",
    "Summarise what is known about {}.", "What is the history of {}?", "Why does {} matter?",
    "Write a list of questions to ask an expert about {}.", "Describe {} in simple words.",
    "Write a blog post introduction about {}.", "How would you teach a class about {}?",
    "Write a dialogue between two friends who talk about {}.", "What are common mistakes with {}?",
    "How has {} changed in the last fifty years?", "Write a product description that has to do with {}.",
    "Compare {} with something similar.", "What should a beginner know about {}?",
    "Write step by step instructions that have to do with {}.", "Write a news report about {}.",
    "Write a Python function that has to do with {}, and explain it.", "Define {} and give an example.",
    "What might the future of {} look like?", "Write a letter to a friend about {}.", "Make a plan to learn about {}.",
    "Tell me something surprising about {}.",
)  # fmt: skip

SUBJECTS = (
    "photosynthesis", "the Roman Empire", "baking bread", "electric cars", "the stock market", "gardening",
    "the moon", "machine learning", "healthy sleep", "the French Revolution", "chess", "rain", "public transport",
    "the human heart", "classical music", "remote work", "volcanoes", "coffee", "democracy", "sorting algorithms",
    "the ocean", "time management", "dogs", "the printing press", "solar power", "learning a language", "bees",
    "budgeting", "black holes", "football", "the Great Wall of China", "vaccines", "friendship", "databases",
    "mountains", "cooking pasta", "the internet", "dreams", "recycling", "the Renaissance", "yoga", "prime numbers",
    "job interviews", "whales", "bridges", "poetry", "climate change", "bicycles", "ancient Egypt", "bacteria",
    "negotiation", "trees", "the immune system", "photography", "inflation", "robots", "tea", "public speaking",
    "dinosaurs", "recursion", "the desert", "museums", "electricity", "stress", "penguins", "the Olympic Games",
    "small businesses", "gravity", "cheese", "libraries", "the brain", "running", "fractions", "jazz", "rivers",
    "social media", "the Industrial Revolution", "cats", "water", "marketing", "butterflies", "lists and dictionaries",
    "earthquakes", "vegetables", "space travel", "family traditions", "probability", "painting", "the solar system",
    "teamwork", "insulin", "castles", "renewable energy", "spelling", "ants", "travel by train", "passwords",
    "the theatre", "calories", "snow",
)  # fmt: skip

HELD_OUT = (
    "I have a meeting with my boss tomorrow and I am nervous. What can I do?",
    "Can you recommend a good book for a long flight?",
    "My computer is slow. How do I find out why?",
    "Rewrite this sentence politely: Send me the report now.",
    "Translate into plain English: the aforementioned party shall be liable.",
    "What is the capital of Australia, and what is it known for?",
    "If a shirt costs 20 dollars and is reduced by 25 percent, what does it cost?",
    "Which planets have rings?",
    "Name the seven colours of the rainbow in order.",
    "How do I remove a red wine stain from a carpet?",
    "Should I rent or buy a home?",
    "Who wrote Pride and Prejudice, and when was it published?",
    "Suggest a dinner that uses eggs, spinach and rice.",
    "What happens when a company goes bankrupt?",
    "Convert 100 degrees Fahrenheit to Celsius and show the steps.",
    "I want to start running again after an injury. Any advice?",
    "Give me a slogan for a shop that sells umbrellas.",
    "Is a tomato a fruit or a vegetable?",
    "How many minutes are there in a week?",
    "Write a birthday message for my grandmother, who loves roses.",
    "Explain the difference between weather and climate.",
    "What does the word ubiquitous mean? Use it in a sentence.",
    "How does a refrigerator keep food cold?",
    "Which is larger, 3/4 or 5/8, and why?",
    "Draft a complaint about a late delivery.",
    "What should I pack for a weekend in Iceland?",
    "Why do leaves change colour in autumn?",
    "List the steps to change a flat tyre.",
    "What are the primary duties of a mayor?",
    "Write a loop in Python that prints the even numbers from 2 to 20.",
    "How can parents help a shy child make friends?",
    "Who was Marie Curie?",
)


def instructions() -> list[str]:
    """Every form with every subject, 3,000 of them: of any 100 in a row no two have the same subject."""
    count = len(SUBJECTS)
    return [
        FORMS[(number + number // count) % len(FORMS)].format(SUBJECTS[number % count])
        for number in range(len(FORMS) * count)
    ]


def excerpts(documents: Sequence[Document], most: int) -> list[str]:
    """Places in files, each of a few lines, taken evenly and in an order in which any beginning has seen most
    files."""
    found = [
        (begin, "".join(lines[begin : begin + LINES]))
        for lines in (document.text.splitlines(keepends=True) for document in documents)
        for begin in range(0, len(lines) - LINES, STRIDE)
    ]
    return [text for _, text in sorted(found, key=lambda place: place[0])[:most]]


def main(split: str) -> None:
    """Print one split as JSONL."""
    chats = {"train": instructions(), "held-out": list(HELD_OUT)}
    texts = {"python": ("train", 1500), "held-out-python": ("validation", 60)}
    if split in chats:
        lines: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": text}]} for text in chats[split]]
    elif split in texts:
        name, most = texts[split]
        lines = [{"prompt": text} for text in excerpts(getattr(load_stdlib(), name), most)]
    else:
        raise SystemExit(f"{split!r} is no split: use one of {', '.join([*chats, *texts])}.")
    for line in lines:
        print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
