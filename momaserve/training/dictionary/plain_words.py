"""The demo's test: 100 plain words that no training prompt ever asks for.

Written before training. A prompt of the test is right when the drawn picture is one of the
accepted ones; the model has to find it through related prompts, since `is_kept_out` keeps the
words themselves (with any wrapper of wrappers.py around them) out of training.
"""

import re

from momaserve.training.dictionary.item import Item
from momaserve.training.dictionary.wrappers import unwrap

_LINES = """\
dog: dog face; dog; guide dog; service dog; poodle
cat: cat face; cat; black cat; grinning cat; grinning cat with smiling eyes; \
cat with tears of joy; smiling cat with heart-eyes; cat with wry smile; kissing cat; weary cat; \
crying cat; pouting cat
horse: horse face; horse
elephant: elephant
monkey: monkey face; monkey; see-no-evil monkey; hear-no-evil monkey; speak-no-evil monkey
bird: bird; dove; eagle; duck; swan; owl; parrot; flamingo; peacock; penguin; baby chick; \
front-facing baby chick; hatching chick; chicken; rooster; turkey
fish: fish; tropical fish; blowfish; shark
snake: snake
butterfly: butterfly
whale: whale; spouting whale
puppy: dog face; dog; guide dog; service dog; poodle
kitten: cat face; cat; black cat; grinning cat; grinning cat with smiling eyes; \
smiling cat with heart-eyes; kissing cat; weary cat; crying cat; pouting cat; \
cat with tears of joy; cat with wry smile
bunny: rabbit face; rabbit
bee: honeybee
ladybug: lady beetle
tree: evergreen tree; deciduous tree; palm tree; christmas tree; tanabata tree
flower: rose; tulip; sunflower; hibiscus; blossom; cherry blossom; white flower; wilted flower; \
bouquet; rosette; lotus
rose: rose; wilted flower
leaf: maple leaf; fallen leaf; leaf fluttering in wind; herb; shamrock; four leaf clover
apple: red apple; green apple
banana: banana
pizza: pizza
cheese: cheese wedge
bread: bread; baguette bread; flatbread; croissant
cake: birthday cake; shortcake; cupcake; moon cake
ice cream: ice cream; soft ice cream
cookie: cookie; fortune cookie
egg: egg; cooking; hatching chick; nest with eggs
wine: wine glass; bottle with popping cork; clinking glasses
coffee: hot beverage
burger: hamburger
donut: doughnut
car: automobile; oncoming automobile; racing car; police car; oncoming police car; taxi; \
oncoming taxi; sport utility vehicle; pickup truck
train: train; locomotive; railway car; high-speed train; bullet train; metro; light rail; \
station; tram; tram car; monorail; mountain railway; suspension railway
bus: bus; oncoming bus; trolleybus; minibus; bus stop
truck: delivery truck; articulated lorry; pickup truck; fire engine
boat: sailboat; motor boat; speedboat; canoe; ship; passenger ship; ferry; person rowing boat
rocket: rocket
plane: airplane; small airplane; airplane departure; airplane arrival
auto: automobile; oncoming automobile; racing car; sport utility vehicle; taxi; oncoming taxi; \
police car; oncoming police car
bike: bicycle; motorcycle; person biking; person mountain biking
sun: sun; sun with face; sunrise; sunset; sunrise over mountains; \
sun behind small cloud
moon: new moon; waxing crescent moon; first quarter moon; waxing gibbous moon; full moon; \
waning gibbous moon; last quarter moon; waning crescent moon; crescent moon; new moon face; \
first quarter moon face; last quarter moon face; full moon face
star: star; glowing star; shooting star; dizzy; eight-pointed star
cloud: cloud; cloud with lightning and rain; cloud with rain; cloud with snow; \
cloud with lightning; sun behind cloud; sun behind small cloud; sun behind large cloud; \
sun behind rain cloud; fog
rain: cloud with rain; cloud with lightning and rain; sun behind rain cloud; \
umbrella with rain drops
snow: snowflake; cloud with snow; snowman; snowman without snow; snow-capped mountain
fire: fire
mountain: mountain; snow-capped mountain; mount fuji; volcano; sunrise over mountains
rainbow: rainbow
hurricane: cyclone; tornado
earth: globe showing europe-africa; globe showing americas; globe showing asia-australia; \
globe with meridians
happy face: grinning face; grinning face with big eyes; grinning face with smiling eyes; \
beaming face with smiling eyes; grinning squinting face; slightly smiling face; smiling face; \
smiling face with smiling eyes; smiling face with hearts; smiling face with open hands; \
face with tears of joy; rolling on the floor laughing; smiling face with halo; partying face; \
smiling face with sunglasses; face savoring food; grinning face with sweat; \
smiling face with heart-eyes; star-struck
sad face: slightly frowning face; frowning face; frowning face with open mouth; crying face; \
loudly crying face; disappointed face; pensive face; sad but relieved face; worried face; \
anguished face; weary face; confounded face; persevering face; downcast face with sweat; \
face holding back tears; smiling face with tear; pleading face
angry face: angry face; enraged face; face with symbols on mouth; angry face with horns
devil: angry face with horns; smiling face with horns
heart: red heart; orange heart; yellow heart; green heart; blue heart; purple heart; brown heart; \
black heart; white heart; heart with arrow; heart with ribbon; sparkling heart; growing heart; \
beating heart; revolving hearts; two hearts; heart decoration; heart exclamation; broken heart; \
heart on fire; mending heart; heart suit; anatomical heart
ghost: ghost
robot: robot
ufo: flying saucer; alien monster
soccer: soccer ball
basketball: basketball; person bouncing ball
swimming: person swimming
tennis: tennis
golf: person golfing; flag in hole
yoga: person in lotus position
chair: chair; seat
bed: bed; person in bed
sofa: couch and lamp
lamp: light bulb; diya lamp; couch and lamp; red paper lantern; flashlight
key: key; old key; locked with key
clock: alarm clock; mantelpiece clock; timer clock; stopwatch; watch; one o’clock; two o’clock; \
three o’clock; four o’clock; five o’clock; six o’clock; seven o’clock; eight o’clock; \
nine o’clock; ten o’clock; eleven o’clock; twelve o’clock; one-thirty; two-thirty; \
three-thirty; four-thirty; five-thirty; six-thirty; seven-thirty; eight-thirty; nine-thirty; \
ten-thirty; eleven-thirty; twelve-thirty
phone: mobile phone; mobile phone with arrow; telephone; telephone receiver
computer: laptop; desktop computer
camera: camera; camera with flash; video camera; movie camera
tv: television
book: closed book; open book; green book; blue book; orange book; books; notebook; \
notebook with decorative cover; ledger
scissors: scissors
umbrella: umbrella; closed umbrella; umbrella with rain drops; umbrella on ground; \
beach with umbrella
home: house; house with garden; houses
present: wrapped gift
painting: framed picture; artist palette
piano: musical keyboard
guitar: guitar
bomb: bomb; firecracker
eye: eye; eyes; eye in speech bubble
hand: raised hand; waving hand; raised back of hand; hand with fingers splayed; vulcan salute; \
palm up hand; palm down hand; rightwards hand; leftwards hand; ok hand; open hands; \
clapping hands; raising hands; pinching hand; victory hand; index pointing up; writing hand
shoe: man’s shoe; running shoe; high-heeled shoe; flat shoe; hiking boot; woman’s sandal; \
woman’s boot; ballet shoes; thong sandal
hat: top hat; woman’s hat; billed cap; graduation cap; cowboy hat face
trousers: jeans; shorts
firefighter: firefighter
teacher: teacher
nurse: health worker
chef: cook
wizard: mage
stop sign: stop sign
question mark: red question mark; white question mark; exclamation question mark
japanese flag: flag: japan; crossed flags
flag of france: flag: france; flag: st. martin; flag: clipperton island
american flag: flag: united states; flag: u.s. outlying islands
"""

PLAIN_WORDS: dict[str, tuple[str, ...]] = {
    word: tuple(names.split("; "))
    for word, _, names in (line.partition(": ") for line in _LINES.splitlines())
}
"""Each word or phrase and the names of the items that a fair person would accept for it."""

_GENDER = re.compile(r"^(?:men|women|people|man|woman|person)(?: |: )(?=.)")


def words_of(text: str) -> tuple[str, ...]:
    """The words of a prompt in alphabetic order, without wrappers and punctuation."""
    return tuple(sorted(re.findall(r"[^\W_]+", unwrap(text))))


_KEPT_OUT = frozenset(map(words_of, PLAIN_WORDS))


def is_kept_out(prompt: str) -> bool:
    """Whether a prompt asks for exactly one of the plain words, however it is put.

    Case, articles, wrappers, punctuation and the order of words do not count: "Draw a Pizza!" is
    kept out and so is the keyword list "sign, stop". Asking for a gloss is another task: "define
    pizza" is not kept out.
    """
    return words_of(prompt) in _KEPT_OUT


def accepts(word: str, item: Item) -> bool:
    """Whether drawing `item` is right for a plain word; skin tone and gender do not matter."""
    wanted = {_without_gender(name) for name in PLAIN_WORDS[word]}
    return _without_gender(item.base_name) in wanted


def _without_gender(name: str) -> str:
    return _GENDER.sub("", name)
