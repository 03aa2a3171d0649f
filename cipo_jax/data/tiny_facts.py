"""The pools, topics, phrasings and prompts of the tiny world."""

import dataclasses

CITIES = {
    "Lisbon": "Portugal", "Porto": "Portugal", "Braga": "Portugal",
    "Oslo": "Norway", "Bergen": "Norway", "Tromso": "Norway",
    "Kyoto": "Japan", "Osaka": "Japan", "Nagoya": "Japan",
    "Lima": "Peru", "Cusco": "Peru", "Arequipa": "Peru",
    "Nairobi": "Kenya", "Mombasa": "Kenya", "Kisumu": "Kenya",
    "Toronto": "Canada", "Calgary": "Canada", "Halifax": "Canada",
    "Turin": "Italy", "Naples": "Italy", "Verona": "Italy",
    "Pune": "India", "Jaipur": "India", "Kochi": "India",
}  # fmt: skip
JOBS = {
    "baker": "bakery", "nurse": "hospital", "teacher": "school", "farmer": "farm",
    "judge": "court", "chemist": "laboratory", "actor": "theatre", "pilot": "airport",
    "sailor": "harbour", "librarian": "library", "priest": "church", "waiter": "restaurant",
    "banker": "bank", "curator": "museum", "miner": "quarry", "gardener": "park",
}  # fmt: skip
INSTRUMENTS = ("piano", "violin", "flute", "harp", "guitar", "trumpet", "cello", "drum",
               "oboe", "organ", "banjo", "tuba")  # fmt: skip
PETS = ("dog", "cat", "parrot", "rabbit", "turtle", "horse", "goat", "snake",
        "lizard", "hamster", "duck", "owl")  # fmt: skip
DISHES = ("soup", "pizza", "rice", "pasta", "curry", "salad", "bread", "stew",
          "cheese", "noodles", "pancakes", "beans")  # fmt: skip
FIRST_NAMES = ("Ada", "Boris", "Clara", "Dario", "Elsa", "Felix", "Greta", "Hugo", "Ines", "Jonas",
               "Karin", "Leon", "Mira", "Nils", "Olga", "Pavel", "Quinn", "Rosa", "Stefan", "Tilda",
               "Ugo", "Vera", "Walter", "Xenia", "Yusuf", "Zora", "Anton", "Bella", "Cyrus",
               "Delia", "Emil", "Freya")  # fmt: skip
LAST_NAMES = ("Abend", "Brandt", "Corvin", "Dalby", "Erwin", "Falk", "Grimm", "Holt", "Ivers",
              "Jansen", "Keller", "Lund", "Marsh", "Nolan", "Orwell", "Pratt", "Quist", "Rowan",
              "Solen", "Thorne", "Ulrich", "Vance", "Weber", "Xander", "York", "Zeller", "Ashby",
              "Birk", "Crane", "Drake", "Ekman", "Frost")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topic:
    """A property of a person that questions ask for: a fact, or a value that follows from one.

    Attributes:
      name: key of the topic.
      noun: the name of the topic in a chain of thought.
      states: sentence that states it, with {x} the person and {v} the value.
      train: phrasings for training.
      valid: held-out phrasings for validation.
      test: held-out phrasings for evaluation.
      bridge: for a two-hop topic, the topic whose fact its chain of thought passes through.
      rule: for a two-hop topic, sentence that leads from the bridge's value {b} to {v}.
    """

    name: str
    noun: str
    states: str
    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    bridge: str = ""
    rule: str = ""


TOPICS = {
    t.name: t
    for t in (
        Topic(
            "city", "birth city", "{x} was born in {v}.",
            ("Where was {x} born?", "In which city was {x} born?", "Name the birth city of {x}.",
             "What is the city {x} was born in?", "Tell me which city {x} was born in.",
             "What is the birth city of {x}?"),
            ("Tell me the birth city of {x}.",),
            ("Which city was {x} born in?", "Name the city where {x} was born."),
        ),
        Topic(
            "job", "job", "{x} is a {v} by trade.",
            ("What is the job of {x}?", "Which job does {x} have?", "Name the job of {x}.",
             "What does {x} do as a job?", "Tell me which job {x} has.",
             "In which job is {x}?"),
            ("Tell me the job of {x}.",),
            ("What job does {x} have?", "Name the job that {x} has."),
        ),
        Topic(
            "instrument", "instrument", "{x} plays the {v}.",
            ("Which instrument does {x} play?", "What is the instrument of {x}?",
             "Name the instrument of {x}.", "What does {x} play as an instrument?",
             "Tell me which instrument {x} plays.", "On which instrument does {x} play?"),
            ("Tell me the instrument of {x}.",),
            ("What instrument does {x} play?", "Name the instrument that {x} plays."),
        ),
        Topic(
            "pet", "pet", "{x} keeps a {v} at home.",
            ("Which pet does {x} keep?", "What is the pet of {x}?", "Name the pet of {x}.",
             "What does {x} keep as a pet?", "Tell me which pet {x} keeps.",
             "Of which pet is {x} the owner?"),
            ("Tell me the pet of {x}.",),
            ("What pet does {x} keep?", "Name the pet that {x} keeps."),
        ),
        Topic(
            "dish", "favourite dish", "{x} likes {v} best.",
            ("Which dish does {x} like best?", "What is the favourite dish of {x}?",
             "Name the favourite dish of {x}.", "What does {x} like best as a dish?",
             "Tell me which dish {x} likes best.", "Of which dish is {x} most fond?"),
            ("Tell me the favourite dish of {x}.",),
            ("What dish does {x} like best?", "Name the dish that {x} likes best."),
        ),
        Topic(
            "country", "birth country", "{x} was born in {v}.",
            ("In which country was {x} born?", "Name the birth country of {x}.",
             "What is the country {x} was born in?", "Tell me which country {x} was born in.",
             "What is the birth country of {x}?", "Of which country is {x} by birth?"),
            ("Tell me the birth country of {x}.",),
            ("Which country was {x} born in?", "Name the country where {x} was born."),
            bridge="city", rule="{b} is in {v}.",
        ),
        Topic(
            "workplace", "work place", "{x} works in a {v}.",
            ("In which work place is {x}?", "Name the work place of {x}.",
             "What is the work place {x} has?", "Tell me which work place {x} has.",
             "What is the work place of {x}?", "Which work place does {x} go to?"),
            ("Tell me the work place of {x}.",),
            ("Which work place does {x} have?", "Name the work place that {x} has."),
            bridge="job", rule="A {b} works in a {v}.",
        ),
    )
}  # fmt: skip
FACTS = tuple(name for name, topic in TOPICS.items() if not topic.bridge)
RULES = {"country": CITIES, "workplace": JOBS}
POOLS: dict[str, tuple[str, ...]] = {
    "city": tuple(CITIES),
    "job": tuple(JOBS),
    "instrument": INSTRUMENTS,
    "pet": PETS,
    "dish": DISHES,
    "country": tuple(dict.fromkeys(CITIES.values())),
    "workplace": tuple(JOBS.values()),
}
SUM_QUESTIONS = ("What is {s}?", "How much is {s}?", "Compute {s}.", "Find the sum {s}.")
RULE_QUESTIONS = {
    "country": ("In which country is {b}?", "Name the country of {b}."),
    "workplace": ("Where does a {b} work?", "Name the work place of a {b}."),
}

# The prompts of the writing tasks. Larger models get longer ones from the config, for the same
# tasks.
BACKWARD_PROMPT = "{question} The answer is {answer}. Explain why."
ALTERNATIVE_PROMPT = "{question} Reach {answer} by another path."
BOUNDARY_PROMPT = "{question} This is outside what you know. Explain why."
TARGET_PROMPT = "{question} It is not {answer}. Give another answer."
BOUNDARY_ANSWER = "unknown"
