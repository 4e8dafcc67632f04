"""The things the box model learns to draw, and what people call them.

Owns the list of common things, the everyday names of emoji labels, and articles (a, an, the, none).
Knows nothing of pictures, files or random captions. A *label* is the name that emojibase gives;
a *name* is what a person would type.
"""

from __future__ import annotations

# label -> names, the usual one first. The keys of COMMON are the things of `--things common`.
COMMON: dict[str, tuple[str, ...]] = {
    # animals
    "cat face": ("cat", "cat face", "kitty"),
    "dog face": ("dog", "dog face", "puppy"),
    "frog": ("frog", "frog face"),
    "lion": ("lion", "lion face"),
    "tiger face": ("tiger", "tiger face"),
    "bear": ("bear", "bear face"),
    "panda": ("panda", "panda bear"),
    "koala": ("koala", "koala bear"),
    "fox": ("fox", "fox face"),
    "rabbit face": ("rabbit", "bunny", "rabbit face"),
    "mouse face": ("mouse", "mouse face"),
    "pig face": ("pig", "pig face"),
    "cow face": ("cow", "cow face"),
    "monkey face": ("monkey", "monkey face"),
    "elephant": ("elephant",),
    "giraffe": ("giraffe",),
    "penguin": ("penguin",),
    "owl": ("owl",),
    "duck": ("duck",),
    "parrot": ("parrot",),
    "turtle": ("turtle", "tortoise"),
    "crocodile": ("crocodile", "alligator"),
    "snake": ("snake",),
    "spouting whale": ("whale", "spouting whale"),
    "dolphin": ("dolphin",),
    "shark": ("shark",),
    "fish": ("fish",),
    "tropical fish": ("tropical fish",),
    "octopus": ("octopus",),
    "crab": ("crab",),
    "butterfly": ("butterfly",),
    "honeybee": ("bee", "honeybee"),
    "lady beetle": ("ladybug", "ladybird", "lady beetle"),
    "snail": ("snail",),
    "unicorn": ("unicorn", "unicorn face"),
    # plants
    "rose": ("rose", "red rose"),
    "sunflower": ("sunflower",),
    "tulip": ("tulip",),
    "deciduous tree": ("tree", "green tree"),
    "palm tree": ("palm tree", "palm"),
    "cactus": ("cactus",),
    "mushroom": ("mushroom", "toadstool", "red mushroom"),
    "maple leaf": ("maple leaf",),
    # food and drink
    "red apple": ("red apple", "apple"),
    "green apple": ("green apple",),
    "banana": ("banana",),
    "tangerine": ("orange", "tangerine", "orange fruit"),
    "lemon": ("lemon",),
    "grapes": ("grapes", "bunch of grapes"),
    "watermelon": ("watermelon", "slice of watermelon"),
    "strawberry": ("strawberry",),
    "cherries": ("cherries",),
    "pineapple": ("pineapple",),
    "pear": ("pear",),
    "avocado": ("avocado",),
    "carrot": ("carrot",),
    "tomato": ("tomato",),
    "broccoli": ("broccoli",),
    "eggplant": ("eggplant", "aubergine"),
    "croissant": ("croissant",),
    "cheese wedge": ("cheese", "piece of cheese"),
    "hamburger": ("hamburger", "burger"),
    "pizza": ("pizza", "slice of pizza"),
    "french fries": ("french fries", "fries"),
    "soft ice cream": ("ice cream", "ice cream cone"),
    "doughnut": ("donut", "doughnut"),
    "birthday cake": ("birthday cake", "cake"),
    "cupcake": ("cupcake",),
    "hot beverage": ("coffee", "cup of coffee", "coffee cup"),
    "beer mug": ("beer", "mug of beer", "beer mug"),
    # travel and places, sky
    "house": ("house", "home"),
    "castle": ("castle",),
    "automobile": ("car", "red car", "automobile"),
    "bus": ("bus",),
    "fire engine": ("fire truck", "fire engine"),
    "tractor": ("tractor",),
    "bicycle": ("bicycle", "bike"),
    "sailboat": ("sailboat", "sailing boat"),
    "airplane": ("airplane", "plane"),
    "helicopter": ("helicopter",),
    "rocket": ("rocket", "space rocket"),
    "flying saucer": ("ufo", "flying saucer"),
    "sun": ("sun",),
    "crescent moon": ("moon", "crescent moon"),
    "star": ("star", "yellow star"),
    "cloud": ("cloud",),
    "rainbow": ("rainbow",),
    "ringed planet": ("planet", "saturn", "planet with a ring"),
    "volcano": ("volcano",),
    "umbrella": ("umbrella",),
    "snowman without snow": ("snowman",),
    "snowflake": ("snowflake",),
    "fire": ("fire", "flame"),
    "anchor": ("anchor",),
    "alarm clock": ("alarm clock", "clock"),
    # activities
    "soccer ball": ("soccer ball", "football"),
    "basketball": ("basketball",),
    "trophy": ("trophy", "gold cup"),
    "balloon": ("balloon", "red balloon"),
    "wrapped gift": ("gift", "present", "gift box"),
    "jack-o-lantern": ("halloween pumpkin", "pumpkin", "jack-o-lantern"),
    "Christmas tree": ("christmas tree",),
    "teddy bear": ("teddy bear",),
    # objects
    "guitar": ("guitar",),
    "trumpet": ("trumpet",),
    "violin": ("violin",),
    "drum": ("drum",),
    "key": ("key",),
    "locked": ("lock", "padlock"),
    "light bulb": ("light bulb", "bulb"),
    "open book": ("book", "open book"),
    "camera": ("camera",),
    "laptop": ("laptop", "computer"),
    "television": ("television", "tv"),
    "scissors": ("scissors", "pair of scissors"),
    "pencil": ("pencil",),
    "hammer": ("hammer",),
    "crown": ("crown", "gold crown"),
    "top hat": ("top hat", "hat"),
    "gem stone": ("diamond", "gem", "gemstone"),
    "glasses": ("glasses", "pair of glasses"),
    "running shoe": ("shoe", "sneaker", "running shoe"),
    "bell": ("bell", "golden bell"),
    "candle": ("candle",),
    "chair": ("chair",),
    "magnet": ("magnet",),
    "telescope": ("telescope",),
}

# The things of `--things core`, which the diffusion model learns first: plain shapes that differ from one another.
CORE: tuple[str, ...] = (
    "cat face", "dog face", "frog", "penguin", "spouting whale", "octopus", "butterfly", "rose", "sunflower",
    "deciduous tree", "cactus", "mushroom", "red apple", "banana", "strawberry", "hamburger", "pizza", "house",
    "castle", "automobile", "airplane", "rocket", "sun", "star", "rainbow", "umbrella", "snowman without snow",
    "soccer ball", "balloon", "guitar", "light bulb", "crown",
)  # fmt: skip

# The things of `--things box`: what the model in the box draws.
BOX: tuple[str, ...] = (
    *CORE, "panda", "fox", "duck", "turtle", "watermelon", "pineapple", "doughnut", "soft ice cream",
)  # fmt: skip

# (label, style) that no picture of `--things box` shows: what the model draws of them, it composed itself.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("frog", "flat"), ("rose", "flat"), ("rocket", "flat"),
        ("penguin", "3d"), ("strawberry", "3d"), ("house", "3d"),
        ("octopus", "cartoon"), ("mushroom", "cartoon"), ("balloon", "cartoon"),
        ("butterfly", "sticker"), ("pineapple", "sticker"), ("crown", "sticker"),
    }
)  # fmt: skip

# Labels of the other things that a person would hardly type.
ALIASES: dict[str, tuple[str, ...]] = {
    "articulated lorry": ("truck", "lorry"),
    "baguette bread": ("baguette",),
    "billed cap": ("cap", "baseball cap"),
    "bottle with popping cork": ("champagne bottle", "champagne"),
    "bullseye": ("target", "dartboard"),
    "closed book": ("closed book", "red book"),
    "cooking": ("fried egg", "frying pan with an egg"),
    "couch and lamp": ("couch", "sofa", "couch and lamp"),
    "ear of corn": ("corn", "ear of corn"),
    "electric plug": ("plug", "electric plug"),
    "evergreen tree": ("pine tree", "fir tree", "evergreen tree"),
    "front-facing baby chick": ("chick", "baby chick"),
    "fuel pump": ("gas pump", "fuel pump"),
    "game die": ("dice", "die"),
    "globe showing Americas": ("earth", "globe", "globe showing americas"),
    "globe showing Asia-Australia": ("globe", "globe showing asia"),
    "globe showing Europe-Africa": ("globe", "globe showing europe and africa"),
    "heart suit": ("red heart", "heart", "heart suit"),
    "high voltage": ("lightning bolt", "lightning"),
    "high-heeled shoe": ("high heel", "high-heeled shoe"),
    "hourglass done": ("hourglass",),
    "hourglass not done": ("hourglass with flowing sand", "hourglass"),
    "locomotive": ("steam train", "locomotive"),
    "magnifying glass tilted left": ("magnifying glass",),
    "magnifying glass tilted right": ("magnifying glass",),
    "locked with key": ("lock and key", "lock with a key"),
    "locked with pen": ("lock with a pen",),
    "meat on bone": ("meat on a bone", "meat"),
    "open mailbox with raised flag": ("mailbox", "open mailbox"),
    "optical disk": ("cd", "optical disk"),
    "package": ("cardboard box", "box", "package"),
    "performing arts": ("theater masks",),
    "poultry leg": ("chicken leg", "drumstick"),
    "pool 8 ball": ("8 ball", "pool ball", "black billiard ball"),
    "sauropod": ("dinosaur", "long-necked dinosaur"),
    "snow-capped mountain": ("snowy mountain", "mountain with snow"),
    "snowman": ("snowman in the snow", "snowman with snow"),
    "spiral shell": ("shell", "sea shell"),
    "sport utility vehicle": ("suv", "blue suv"),
    "studio microphone": ("studio microphone", "microphone"),
    "tennis": ("tennis racket", "tennis"),
    "wastebasket": ("trash can", "wastebasket"),
    "unlocked": ("open lock", "open padlock"),
}

_THE = {"sun", "moon", "earth", "milky way", "statue of liberty", "kaaba"}
_BARE = {
    "bacon", "badminton", "beer", "bowling", "bread", "broccoli", "bubble tea", "butter", "camping", "canned food",
    "champagne", "cheese", "coffee", "construction", "cooked rice", "coral", "corn", "curry rice", "dice", "dna",
    "falafel", "field hockey", "fire", "fog", "foggy", "fondue", "garlic", "ginger root", "green salad", "herb", "ice",
    "ice hockey", "lacrosse", "leafy green", "lightning", "mate", "meat", "mount fuji", "oden", "ping pong",
    "popcorn", "pouring liquid", "sake", "salt", "shaved ice", "soap", "spaghetti", "sushi", "tennis", "thread",
    "tokyo tower", "wood", "yarn",
}  # fmt: skip
_AN_ANYWAY = ("hour", "heir", "honest", "x-ray", "8 ", "e-mail", "lp ")
_A_ANYWAY = ("uni", "one", "euro", "ukulele", "ufo", "use", "suv", "utility")


def names_of(label: str, is_animal: bool = False) -> tuple[str, ...]:
    """Names of an emojibase label, the usual one first; `cat face` of an animal is mostly `cat`."""
    label = label.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    known = COMMON.get(label) or ALIASES.get(label)
    if known:
        return known
    if label.endswith(("o'clock", "-thirty")):
        return (f"clock showing {label}",)
    if is_animal and label.endswith(" face"):
        return (label.removesuffix(" face"), label)
    return (label,)


def with_article(name: str) -> str:
    """`apple` -> `an apple`, `sun` -> `the sun`, `grapes` -> `grapes`."""
    low = name.lower()
    if low in _THE:
        return f"the {name}"
    if low in _BARE or _is_plural(low):
        return name
    if low.startswith(_AN_ANYWAY) or (low[0] in "aeiou" and not low.startswith(_A_ANYWAY)):
        return f"an {name}"
    return f"a {name}"


def _is_plural(name: str) -> bool:
    head = name.split(" of ")[0].split(" with ")[0].split(" and ")[-1]
    last = head.split()[-1]
    return last.endswith("s") and not last.endswith(("ss", "us", "'s"))
