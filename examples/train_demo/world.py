"""The closed world the demo model knows: small tables of facts, canned talk, and name lists. Data only, no logic.

Every entry has exactly one answer, so that exact match on a held-out prompt is well defined.
"""

from __future__ import annotations


def _pairs(text: str) -> dict[str, str]:
    """Parse ``key: value`` entries separated by semicolons."""
    return dict(tuple(part.strip().split(": ", 1)) for part in text.split(";"))  # type: ignore[arg-type]


CAPITALS = _pairs(
    "France: Paris; Italy: Rome; Spain: Madrid; Germany: Berlin; Portugal: Lisbon; Greece: Athens; Austria: Vienna; "
    "Poland: Warsaw; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki; Denmark: Copenhagen; Ireland: Dublin; "
    "England: London; Scotland: Edinburgh; Belgium: Brussels; Hungary: Budapest; Japan: Tokyo; China: Beijing; "
    "India: New Delhi; South Korea: Seoul; Thailand: Bangkok; Vietnam: Hanoi; Egypt: Cairo; Kenya: Nairobi; "
    "Morocco: Rabat; Ghana: Accra; Canada: Ottawa; Mexico: Mexico City; Cuba: Havana; Brazil: Brasilia; "
    "Argentina: Buenos Aires; Chile: Santiago; Peru: Lima; Australia: Canberra; New Zealand: Wellington; "
    "Turkey: Ankara; Russia: Moscow; Ukraine: Kyiv; Switzerland: Bern; the United States: Washington"
)
COLOURS = _pairs(
    "the sky: blue; grass: green; snow: white; coal: black; a lemon: yellow; a banana: yellow; a tomato: red; "
    "an orange: orange; a carrot: orange; blood: red; milk: white; the sun: yellow; a leaf: green; chocolate: brown; "
    "a strawberry: red; the sea: blue; a frog: green; a crow: black; a flamingo: pink; an elephant: grey"
)
OPPOSITES = _pairs(
    "hot: cold; big: small; tall: short; fast: slow; up: down; left: right; day: night; light: dark; open: closed; "
    "full: empty; old: new; happy: sad; early: late; easy: hard; loud: quiet; wet: dry; rich: poor; strong: weak; "
    "high: low; near: far; first: last; good: bad; true: false; yes: no; in: out; clean: dirty; thick: thin; "
    "deep: shallow; win: lose; push: pull; start: stop; buy: sell; love: hate; summer: winter; north: south; east: west"
)
SOUNDS = _pairs(
    "dog: bark; cat: meow; cow: moo; duck: quack; sheep: bleat; lion: roar; horse: neigh; pig: oink; frog: croak; "
    "bee: buzz; wolf: howl; snake: hiss; owl: hoot; mouse: squeak"
)
LEGS = _pairs(
    "dog: four; cat: four; cow: four; horse: four; spider: eight; bird: two; duck: two; ant: six; bee: six; "
    "snake: no; fish: no; frog: four; person: two; table: four; octopus: eight"
)
COUNTS = _pairs(
    "days are in a week: There are seven days in a week; months are in a year: There are twelve months in a year; "
    "hours are in a day: There are 24 hours in a day; minutes are in an hour: There are 60 minutes in an hour; "
    "seconds are in a minute: There are 60 seconds in a minute; days are in a year: There are 365 days in a year; "
    "seasons are in a year: There are four seasons in a year; planets are there: There are eight planets; "
    "letters are in the alphabet: There are 26 letters in the alphabet; bits are in a byte: There are eight bits in a byte"
)
KINDS = _pairs(
    "dog: animal; cat: animal; horse: animal; lion: animal; rabbit: animal; apple: fruit; banana: fruit; pear: fruit; "
    "grape: fruit; mango: fruit; carrot: vegetable; potato: vegetable; onion: vegetable; pea: vegetable; rose: flower; "
    "tulip: flower; daisy: flower; red: colour; blue: colour; green: colour; hammer: tool; saw: tool; violin: instrument; "
    "piano: instrument; drum: instrument; oak: tree; pine: tree; car: vehicle; bus: vehicle; train: vehicle"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split() + [f"twenty-{d}" for d in "one two three four".split()]

# Definitions: the thing asked about -> one sentence.
DEFINITIONS = _pairs(
    "mixture-of-experts: A mixture-of-experts model has many small networks called experts, and a router picks a few of "
    "them for each token.; an expert: An expert is a small network inside a model that only works on the tokens sent to "
    "it.; a router: A router is the part of a model that picks which experts see a token.; a token: A token is a small "
    "piece of text that a model reads or writes.; an SSD: An SSD is a fast disk with no moving parts.; a GPU: A GPU is a "
    "chip that does many small sums at the same time.; a CPU: A CPU is the main chip that runs the programs of a "
    "computer.; MLX: MLX is a library from Apple for machine learning.; Flash-MoE: Flash-MoE is a way to run big models "
    "by reading experts from disk only when they are needed.; quantization: Quantization stores the numbers of a model "
    "with fewer bits.; a cache: A cache keeps things close so that they are quick to find again.; a language model: A "
    "language model is a program that guesses the next token of a text.; attention: Attention lets a model look back at "
    "the tokens it has read.; a neural network: A neural network is a program that learns from examples.; a computer: A "
    "computer is a machine that follows programs.; Python: Python is a language for writing programs.; memory: Memory "
    "is where a computer keeps what it is working on.; the sun: The sun is the star that warms the Earth.; the moon: "
    "The moon is the ball of rock that goes around the Earth.; the Earth: The Earth is the planet we live on.; rain: "
    "Rain is water that falls from clouds.; snow: Snow is frozen water that falls from clouds.; ice: Ice is frozen "
    "water.; a cloud: A cloud is made of tiny drops of water.; a river: A river is water that flows to the sea.; a "
    "mountain: A mountain is very high land.; an island: An island is land with water all around it.; a tree: A tree "
    "is a tall plant made of wood.; a book: A book is many pages of text held together.; a clock: A clock is a machine "
    "that shows the time.; a bicycle: A bicycle is a thing with two wheels that you ride.; a robot: A robot is a machine "
    "that can move and do work.; music: Music is sound made to be enjoyed.; a triangle: A triangle is a shape with three "
    "sides.; a square: A square is a shape with four equal sides.; a circle: A circle is a round shape."
)
ALIASES = {"mixture-of-experts": ["mixture of experts", "MoE", "a mixture-of-experts model", "a mixture of experts"]}

NAME_NOT_TOLD = "You have not told me your name."
# Canned talk: several ways to say it -> one answer.
TALK: list[tuple[list[str], str]] = [
    (["Hello", "Hi", "Hey", "Hello there", "Hi there", "Good day", "Greetings"], "Hello! How can I help you?"),
    (["Good morning", "Morning"], "Good morning! How can I help you?"),
    (["Good evening", "Good afternoon"], "Good day! How can I help you?"),
    (["Good night", "Bye", "Goodbye", "See you", "See you later", "Bye bye"], "Goodbye! Have a nice day."),
    (["How are you?", "How are you doing?", "How is it going?", "Are you well?"], "I am well, thank you."),
    (
        [
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Which model are you?",
            "What model is this?",
        ],
        "I am a small demo model whose experts are read from disk.",
    ),
    (
        ["What can you do?", "What can I ask you?", "Help", "How can you help me?", "What do you know?"],
        "I can add small numbers, tell short stories, answer questions about facts you list, and call tools.",
    ),
    (
        ["Thank you", "Thanks", "Thanks a lot", "Thank you very much", "Great, thanks", "Cool, thanks"],
        "You are welcome!",
    ),
    (
        ["How big are you?", "How many parameters do you have?", "How large are you?", "What size are you?"],
        "I have about nine million parameters.",
    ),
    (
        ["How many experts do you have?", "How do your experts work?"],
        "I have 16 experts in each layer, and a router picks 4 of them for each token.",
    ),
    (["Are you a human?", "Are you a person?", "Are you real?", "Are you alive?"], "No, I am a small language model."),
    (
        ["Are you a robot?", "Are you an AI?", "Are you a computer?", "Are you a language model?"],
        "Yes, I am a small language model.",
    ),
    (
        ["Who made you?", "Who trained you?", "Where do you come from?", "Who created you?"],
        "I was trained from scratch as a demo for flash_moe_mlx.",
    ),
    (
        ["Where are your experts?", "Where do you live?", "Where do your weights live?"],
        "My experts live on the disk and are read when they are needed.",
    ),
    (
        ["Tell me a joke", "Tell a joke", "Do you know a joke?", "Say something funny"],
        "Why did the expert go to the disk? It had no memory.",
    ),
    (["OK", "Okay", "Yes", "Fine", "Cool", "Nice", "Great", "I see", "Wow"], "What else can I do for you?"),
    (["No", "No thanks", "Nothing", "Never mind"], "All right. I am here if you need me."),
    (["Sorry", "I am sorry", "Excuse me"], "That is all right."),
    (["You are great", "Well done", "Good job", "I like you", "You are smart"], "Thank you, that is kind."),
    (["I am sad", "I feel sad", "I am tired", "I am bored"], "I am sorry to hear that. Shall I tell you a story?"),
    (["I am happy", "I feel good", "I am fine", "I am well"], "I am glad to hear that."),
    (["What is my name?", "Who am I?", "Do you know my name?"], NAME_NOT_TOLD),
    (["Count to three", "Count to 3"], "One, two, three."),
    (["Count to five", "Count to 5"], "One, two, three, four, five."),
    (["Count to ten", "Count to 10"], "One, two, three, four, five, six, seven, eight, nine, ten."),
    (["Name the days of the week", "List the days of the week"], ", ".join(DAYS) + "."),
    (["Name the months of the year", "List the months of the year", "List the months"], ", ".join(MONTHS) + "."),
    (["Name the seasons", "List the four seasons", "List the seasons"], "Spring, summer, autumn, winter."),
    (["Name three colours", "List three colours", "List three colors", "Name three colors"], "Red, blue and green."),
    (["Name three animals", "List three animals"], "A dog, a cat and a horse."),
    (["Name three fruits", "List three fruits"], "An apple, a banana and a pear."),
    (
        ["Write a haiku", "Write a poem", "Write me a poem", "Tell me a poem"],
        "The disk hums at night, experts wake one by one, words fall like soft snow.",
    ),
]

ANY_STORY = (
    "Once there was a small fox who lived in the forest. One day the fox found a lamp by the river. "
    "The fox carried the lamp home, and the forest was never dark again."
)
# The README and `make demo` ask these; they are never held out.
PINNED = {
    "Explain mixture-of-experts in one line.": DEFINITIONS["mixture-of-experts"],
    "Hello": TALK[0][1],
    "Who are you?": TALK[5][1],
    "What can you do?": TALK[6][1],
    "Tell me a story.": ANY_STORY,
    "What is the capital of France?": "The capital of France is Paris.",
    "What is 12 + 30?": "12 plus 30 is 42.",
    "Tell me a story about Mira and a red fox.": (
        "Once there was a red fox who lived in the forest. One day Mira came by and said hello. The fox loved running, "
        "so they did that all day. In the evening Mira went home, and the fox slept well."
    ),
}

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a small demo model.",
    "Answer in short sentences.",
    "Be brief and polite.",
    "You are a helpful assistant. Use tools when they help.",
    "You are Qwen, a helpful assistant.",
]

NAMES = (
    "Ana Ben Cara Dan Eve Finn Gita Hugo Iris Jon Kim Leo Mia Nils Olga Paul Quinn Rosa Sam Tara Uma Vera Will Xena Yuri "
    "Zoe Alice Bob Carol David Emma Frank Grace Henry Ivan Julia Karl Lena Maria Noah Oscar Petra Ravi Sofia Tom Ursula "
    "Victor Wendy Yara Zack Maya Amir Chen Fatima Diego Hana Ingrid Jamal Kofi Luca Mei Nadia Omar Priya Raj Sara Theo"
).split()
PLACES = (
    "Paris London Rome Tokyo Berlin Madrid Vienna Oslo Lima Cairo Boston Chicago Dublin Prague Zurich Geneva Munich "
    "Hamburg Sydney Toronto Delhi Mumbai Seoul Osaka Kyoto Nairobi Lagos Accra Quito Bogota Havana Lisbon Porto Athens"
).split()
PLACES += ["New York", "San Francisco", "Hong Kong", "Cape Town", "Tel Aviv", "Los Angeles"]
COLOUR_WORDS = "red blue green yellow white black brown pink purple orange grey golden silver".split()
THINGS = (
    "kite boat lamp bike hat ball drum book car coat cup bag box bell ring clock chair table phone guitar umbrella "
    "basket blanket camera candle ladder mirror shovel teapot violin wagon"
).split()
FOODS = "apples pears bread cheese soup rice pizza cake honey noodles salad plums grapes beans pasta tea".split()
JOBS = "baker doctor teacher pilot farmer painter nurse driver writer cook singer builder lawyer dentist".split()
COMMON = (
    "about after again air all always and another any ask back because been before begin best better big body bring build "
    "business but buy call can care change child city class close cold come company country cut dark day did do door down "
    "each eat end even ever every eye face fact family far fast father few find fire first fly follow food foot for form "
    "free friend from game get girl give go good great green group grow half hand hard have head hear help her here high "
    "him his hold home hope hour house how idea into it job just keep kind know land large last late later learn leave left "
    "letter life light like line list little live long look lost love low make man many market may me meet might mind money "
    "moon more morning most mother move much music must my name near need never new next night not nothing now number of off "
    "office old on once only open or order other our out over own page paper park part party people person phone piece plan "
    "plane play please point poor price problem project put question quick rain read ready real report rest right river road "
    "room run same save saw say school sea second see seem sell send set she ship shop short should show side sister sleep "
    "small snow so some song soon sound space stand star start state stay step still stop story street strong study summer "
    "sun sure table take talk tea team tell test than thank that their them then there these they thing think this those "
    "time to today together tomorrow tonight too top town travel tree true try turn two under until up us use very visit "
    "voice wait walk wall want war warm was watch water way we week well went were what when where which while white who why "
    "will wind window winter with woman word work world would write wrong year yes yet you young your"
).split()
# Animals of the stories: home, and what it loves.
ANIMALS = {
    "fox": ("forest", "running"),
    "cat": ("village", "sleeping"),
    "dog": ("farm", "playing"),
    "bear": ("mountains", "eating honey"),
    "rabbit": ("meadow", "jumping"),
    "owl": ("old tower", "reading"),
    "frog": ("pond", "singing"),
    "mouse": ("barn", "eating cheese"),
    "dragon": ("cave", "breathing fire"),
    "horse": ("green hills", "racing"),
    "wolf": ("dark forest", "howling"),
    "duck": ("lake", "swimming"),
    "lion": ("grassland", "resting in the sun"),
    "elephant": ("wide plain", "splashing water"),
    "whale": ("deep sea", "diving"),
    "bird": ("tall tree", "flying"),
    "turtle": ("beach", "walking slowly"),
    "robot": ("workshop", "counting"),
    "unicorn": ("magic garden", "dancing"),
    "penguin": ("cold south", "sliding on ice"),
    "monkey": ("jungle", "climbing"),
    "bee": ("flower field", "making honey"),
    "tiger": ("jungle", "hiding"),
    "goat": ("mountains", "climbing"),
}
# Things of the stories: where it is found.
STORY_THINGS = {
    "kite": "on the hill", "boat": "by the river", "lamp": "in the attic", "book": "in the library", "ball": "in the park",
    "key": "under a stone", "drum": "in the barn", "hat": "on a fence", "bell": "in the old church", "ring": "in the sand",
    "star": "in the sky", "map": "in a bottle", "car": "in the garage", "train": "at the station", "castle": "on the mountain",
    "shell": "on the beach", "flower": "in the garden", "rocket": "in the field", "clock": "in the tower", "violin": "in the attic",
}  # fmt: skip
