"""Glosses written for this project, for words where WordNet's senses miss the picture.

WordNet's commonest sense of "kiwi" is a vine and its "kiss" that can be seen is a cookie. One
line a word, in alphabetic order, in the form "word: gloss".
"""

_LINES = """\
abacus: a frame with beads used for counting
accessibility: the quality of being easy to reach and use
adhesive bandage: a sticky strip that covers a small wound
admission: the right to enter
adult: a grown person
aerial tramway: a cabin that hangs from a cable and carries people uphill
aid: help given to someone
alarm: a loud signal that warns or wakes people
alien: a being from another world
angel: a heavenly being with wings
anger: the strong feeling of being angry
anxious: worried about what may happen
application: a program for a computer
aquarius: the water carrier, eleventh sign of the zodiac
aries: the ram, first sign of the zodiac
asterisk: a small star used as a mark in writing
atm: a machine that gives out money
back: the side opposite to the front
backhand: with the back of the hand to the front
badminton: a game played with light rackets over a net
baggage claim: the place in an airport where you collect your luggage
balance: a device for weighing
bald: having no hair on the head
banana: a long curved yellow fruit
bandage: a strip of cloth that covers a wound
bank: a place where money is kept and lent
bar: a long straight piece
bar chart: a chart that shows amounts as bars
baseball: a small white ball hit with a bat
basketball: a large orange ball thrown through a hoop
bat: a small flying animal that is awake at night
battery: a small device that stores electricity
beads: small round things threaded on a string
beer: a drink made from grain and hops
behind: at the back of
bell pepper: a large mild pepper shaped like a bell
biceps: the muscle at the front of the upper arm
bike: a vehicle with two wheels and pedals
bill: a piece of paper money
biohazard: a thing in nature that can make people ill
bird: an animal with feathers and wings that lays eggs
black: of the color of coal
black cat: a cat with black fur, said to bring bad luck
blind: unable to see
blossom: the flower of a plant or tree
blue: of the color of a clear sky
blue book: a book with a blue cover
board: a flat piece of wood
bolt: a metal pin used with a nut
bone: one of the hard parts that make up a skeleton
book: printed pages bound together between covers
boomerang: a curved piece of wood that comes back when thrown
bow: a ribbon tied with two loops
bowl: a round open dish
bowling: a game in which a ball is rolled at ten pins
box: a container with a lid
brain: the organ in the head with which we think and feel
bright: giving much light
broccoli: a green vegetable with thick stems and many small buds
broken heart: the grief of someone who has lost a love
brown: of the color of earth and wood
building: a structure with a roof and walls
bulb: a round glass part that gives electric light
bunny: a young rabbit
bust: a statue of a head and shoulders
butterfly: an insect with large colorful wings
button: a small round thing that fastens a shirt
cake: a sweet food made of flour, eggs and sugar
calendar: a chart that shows the days and months of a year
call: to speak to someone by telephone
camel: a desert animal with one or two humps on its back
cancer: the crab, fourth sign of the zodiac
cap: a soft hat with a peak
capricorn: the goat, tenth sign of the zodiac
card: a small flat piece of stiff paper
cardinal: one of the main directions
carousel: a ride with wooden horses that goes round
carp: a fresh water fish kept in ponds
cart: a vehicle with wheels that is pushed or pulled
cat: a small furry animal that purrs and is kept as a pet
cell: a small part of something larger
charge: a store of electric power
chart: a drawing that shows figures
check: a mark that shows that something is right
cherry: a small round red fruit with a stone
chess: a game for two played on a board with sixteen pieces each
chestnut: a shiny brown nut that is eaten roasted
chocolate: a sweet brown food made from cocoa
christmas tree: a tree decorated with lights and balls at christmas
circle: a round line, everywhere equally far from its middle
circus: a show with clowns and acrobats in a large tent
cityscape: a view of the buildings of a city
claim: a demand for what is yours
clapper: the part of a bell that strikes it
classical: of the art of old greece and rome
climbing: going up with hands and feet
closed book: a book that is shut
clover: a small plant with leaves of three parts
coaster: a ride with steep tracks, short for roller coaster
cockroach: a flat brown insect that lives in houses
coconut: a large hard brown nut with white flesh and milk inside
cold: having a low temperature
comet: a ball of ice in space with a long bright tail
construction: the work of building something
control: a device that makes a machine obey
convenience: something that makes life easy
cool: a little cold
copyright: the right to publish a work
cork: the stopper of a bottle
corn: a plant with yellow grains that are eaten
cover: something that hides or protects a thing
cow: a farm animal that gives milk
crab: a sea animal with a hard shell and two claws
crayon: a stick of colored wax used for drawing
cream: the fat part of milk
credit: money that is lent and paid back later
credit card: a plastic card used to pay
crescent: the curved shape of the young moon
cricket: a jumping insect that makes a chirping sound
crocodile: a large reptile of warm rivers with massive jaws
cross: two lines that meet in the middle
crossing: a place where people cross a street
crown: a ring of gold worn on the head by a king or queen
cry: to shed tears
crying: shedding tears
crystal: a clear solid with flat faces
cucumber: a long green vegetable eaten in salads
curl: a lock of hair that bends round
customs: the place where luggage is checked at a border
cyclone: a violent storm with winds that blow in a circle
dance: to move in time to music
dark: with little or no light
dash: a short line used in writing
dead: no longer living
deer: a hoofed animal of the woods whose males have antlers
department: one part of a large store or office
derelict: left empty and falling to pieces
desktop: the screen of a computer with its icons
diamond: a very hard clear gem that sparkles
die: a small cube with dots thrown in games
disappointed: sad because something did not come true
discount: an amount taken off a price
dish: a plate or bowl for food
disk: a flat round thing
divide: to split into equal parts
dizzy: having a feeling that everything is spinning
dog: a tame animal that barks and is kept as a pet
dolphin: a clever sea animal with a long snout, related to whales
done: brought to an end
double: twice as much
dove: a small pigeon, a symbol of peace
down: toward a lower place
dragon: a creature of legend with scales and wings that breathes fire
drink: a liquid to swallow
drop: a small round bit of liquid
drum: a round instrument that is beaten with sticks
duck: a swimming bird with a broad bill and webbed feet
e-mail: a message sent from one computer to another
eagle: a large bird of prey with keen sight
earth: the planet on which we live
egg: a round shell laid by a bird, often eaten
eggplant: a large egg-shaped vegetable with shiny purple skin
eight: the number after seven
eighteen: the number after seventeen
eject: to push something out
electric: run by electricity
elephant: a huge gray animal with a trunk and large ears
elevator: a cabin that carries people up and down in a building
eleven: the number after ten
elf: a small magical being with pointed ears
email: a message sent from one computer to another
emblem: a sign that stands for something
engine: a machine that makes things move
entry: the way in
exchange: to give one thing and get another
eyes: the two organs of sight
face: the front of the head, with eyes, nose and mouth
facing: turned toward something
fast: moving quickly
feeding: giving food to
female: of women or girls
fencing: the sport of fighting with thin swords
field: a piece of open land
file: a set of papers kept together
film: a story told in moving pictures
fire: the heat, light and flames of something burning
first: before all others
fish: a water animal with scales, fins and gills
fishing pole: a long rod with a line and a hook to catch fish
five: the number after four
flag: a piece of cloth with colors that stand for a country
flash: a sudden short light
fleur-de-lis: a lily with three petals, used as an emblem
floppy: soft and bending easily
flying: moving through the air
flying saucer: a round spacecraft said to come from another world
foggy: filled with fog, so that it is hard to see
fondue: a hot dish of melted cheese into which bread is dipped
food: what people and animals eat
football: a ball game played by two teams
fortune: good or bad luck
four: the number after three
free: costing nothing
frown: an angry or sad look with wrinkled brow
frowning: showing a frown
full: holding as much as there is room for
garlic: a bulb with a strong smell used in cooking
gem: a precious stone
gemini: the twins, third sign of the zodiac
gender: being male, female or another sort
genie: a magical spirit that lives in a lamp and grants wishes
gesture: a movement of the hand that says something
ghost: the spirit of a dead person that haunts a place
gibbous: more than half but less than fully lit, of the moon
gift: something given to someone
giraffe: a very tall african animal with a long neck
glass: a hard clear material of which windows are made
glasses: two lenses in a frame worn to see better
glove: a covering for the hand
goal: the place a ball must enter to score
golf: a game in which a small ball is hit into holes
good: of the kind one likes
grade: a mark given for school work
green: of the color of grass
growing: becoming larger
guide: someone who shows the way
hamburger: a sandwich of fried minced beef in a bun
hammer: a tool with a heavy head used to drive nails
hand: the part of the body at the end of an arm
hands: the two parts of the body at the ends of the arms
hatching: coming out of an egg
headstone: a stone that marks a grave
hearing: the sense by which sounds are noticed
heart: the organ that pumps blood, a symbol of love
hearts: more than one heart
heavy: hard to lift
here: in this place
hibiscus: a tropical plant with large bright flowers
high: far above the ground
hindu: a follower of hinduism
hippopotamus: a massive animal with thick skin that lives in african rivers
hockey: a game played with curved sticks
holding: having something in the hands
hook: a curved piece of metal to hang or catch things
horn: a hard pointed thing on the head of an animal
horse: a large animal with a mane and hooves that people ride
hot: having a high temperature
hot pepper: a red pepper with a burning taste
hot springs: a place where warm water comes out of the ground
hundred: ten times ten
hut: a small simple house
ice cream: a frozen sweet made from cream and sugar
index: the finger next to the thumb
infinity: something that has no end
input: what is put into a machine
insect: a small animal with six legs
jack-o-lantern: a pumpkin with a face carved into it for halloween
japan: an island country in east asia
joystick: a lever used to control a game or an aircraft
judge: an official who decides cases in a court of justice
juggling: keeping several things in the air by throwing and catching them
key: a piece of metal that opens a lock
keyboard: a set of keys used to type on a computer
kick: a blow with the foot
kimono: a loose japanese robe with wide sleeves
kiss: a touch of the lips as a sign of love
kite: a light toy that flies in the wind on a string
kiwi: a small brown fruit with green flesh
knot: a place where rope is tied
koala: a gray furry australian animal that lives in trees
label: a tag that says what something is
large: bigger than most
last: coming after all the others
latin: the language of ancient rome
latin cross: a cross whose lowest arm is longer than the others
leaf: one of the flat green parts of a plant
ledger: a book in which accounts are kept
left: on the side of the body where the heart is
leo: the lion, fifth sign of the zodiac
leopard: a large wild cat with dark spots
letter: one of the signs of the alphabet
letters: the signs of the alphabet
level: a height or step on a scale
libra: the scales, seventh sign of the zodiac
light: what makes it possible to see
light bulb: a glass bulb that gives light from electricity
lion: a large yellow wild cat of africa whose males have manes
litter: things thrown away on the ground
llama: a woolly pack animal of south america related to the camel
lobster: a sea animal with a hard shell and large claws
lock: a device that keeps a door shut
loop: a round shape made by a line that crosses itself
lorry: a large vehicle that carries goods
lotus: a water plant with large pink or white flowers
love: a strong warm feeling for someone
low: near the ground
lowercase: small, of letters
lowered: brought down
mad: very angry
mail: letters and parcels sent by post
male: of men or boys
mammoth: a hairy extinct elephant with long curved tusks
mango: a sweet tropical fruit with orange flesh
maple: a tree whose leaf has pointed parts
mark: a written or printed sign
massage: the rubbing of the body to relax it
mate: a south american tea drunk through a metal straw
medicine: something that makes a sick person well
medium: of a size between small and large
megaphone: a cone used to make a voice louder
men: more than one man
mending: making whole again
menorah: a candle holder with several branches
middle finger: the longest finger, between the index and the ring finger
military: of soldiers and armies
minus: the sign for taking one number from another
monster: a strange and frightening creature
moon: the round body that circles the earth and shines at night
mouse: a small rodent with a pointed snout and a long tail
movie: a story told in moving pictures
mug: a large cup with a handle
multiply: to take a number several times
mushroom: a fungus with a stem and a cap, often eaten
nail: a thin pointed piece of metal driven into wood
needle: a thin pointed piece of metal used to sew
net: cords knotted together to catch things
new: never used before
new moon: the time when the moon is dark
newspaper: printed sheets with the news of the day
nine: the number after eight
ninja: a warrior trained to move and fight in secret
note: a short piece of writing
notebook: a book of empty pages to write in
numbers: signs used for counting
nut: a dry fruit in a hard shell
octopus: a sea animal with a soft body and eight long arms
officer: a person with the right to give orders
old: having lived a long time
one: the number after zero
open: not closed
ophiuchus: the serpent bearer, a constellation
oyster: a sea animal with a rough shell that may hold a pearl
page: one side of a sheet in a book
palette: a board on which a painter mixes colors
palm tree: a tropical tree with a crown of large leaves
panda: a large black and white bear of china that eats bamboo
parrot: a bright tropical bird that can learn to speak
party: a gathering of people to have fun
passing: going past something
pause: a short stop
peach: a round soft fruit with fuzzy skin and a large stone
peacock: a bird with a huge fan of bright feathers
peanuts: nuts that grow in thin shells under the ground
pen: a tool for writing with ink
penguin: a black and white sea bird that swims but cannot fly
people: human beings
pepper: a hot spice used to season food
performing: acting or playing before people
pet: a tame animal kept at home
phone: a device used to speak to people far away
pick: a tool with a pointed iron head used to break ground
pig: a fat pink farm animal with a flat snout
pill: a small round piece of medicine to swallow
pilot: a person who flies an aircraft
pin: a thin pointed piece of metal that fastens things
pinched: held between finger and thumb
pineapple: a large tropical fruit with sweet yellow flesh and spiky leaves
pirate: a robber who sails the seas
pisces: the fishes, twelfth sign of the zodiac
placard: a sign with a message, carried or put up in public
place: a certain area or spot
plant: a living thing with leaves and roots
plate: a flat dish for food
play: to take part in a game
playing: taking part in a game
plug: a device that connects a cord to electric power
plus: the sign for adding one number to another
point: a sharp end
polo: a game played on horseback with long mallets
position: the place where something is
post: a place that sends and brings letters
potable: safe to drink
punctuation: the marks that divide sentences
purple: of a color between red and blue
purple heart: a heart of purple color, a sign of love
quarter: one of four equal parts
rabbit: a burrowing animal with long ears and a short tail
radioactive: giving off harmful rays
railway: a track of steel rails on which trains run
rainbow: an arc of colors in the sky after rain
raised: held up
raising: lifting up
razor: a sharp tool used in shaving
receipt: a paper that shows what has been paid
red: of the color of blood
registered: protected by an official list of names
relieved: glad that a worry is over
repeat: to do again
reverse: the other way round
rhinoceros: a massive thick-skinned animal with one or two horns on its nose
ribbon: a long narrow band of cloth used for decoration
right: on the side of the body where most people write
ring: a round band worn on a finger
roller: a small wheel
roller coaster: a ride with steep tracks at an amusement park
rolling: turning over and over
rose: a flower with a sweet smell and thorns on its stem
rosette: a ribbon folded like a rose, worn as an award
ruler: a straight strip used to measure and draw lines
running: moving fast on foot
sagittarius: the archer, ninth sign of the zodiac
sake: a japanese drink made from rice
salt: white grains used to season food
scooter: a light vehicle with two wheels, ridden standing
score: the points won in a game
scorpio: the scorpion, eighth sign of the zodiac
scorpion: an eight-legged animal with a stinger at the end of its tail
scroll: a roll of paper with writing on it
seal: a sea animal with flippers that lives on cold shores
seat: a place to sit
seven: the number after six
sewing needle: a thin pointed piece of metal used to sew
shark: a large sea fish with sharp teeth
shield: a flat piece of armor carried to protect the body
shooting star: a streak of light in the night sky
shortcake: a soft cake served with strawberries and cream
showing: letting something be seen
shrimp: a small sea animal with a long tail
sign: a board or mark that tells people something
six: the number after five
sleep: the state of rest at night with closed eyes
small: not large
smile: a happy look with the corners of the mouth turned up
smiling: showing a smile
smoking: the habit of breathing smoke from cigarettes
snail: a small slow animal with a spiral shell
snake: a long reptile without legs
snowflake: a small crystal of snow
spaghetti: long thin strings of pasta
sparkle: a small bright flash of light
speaker: a device that makes sound louder
speech: the act of talking
spiral: a curve that winds round a center
sponge: a soft thing full of holes used for washing
squid: a sea animal with a long body and ten arms
standing: being upright on the feet
statue of liberty: a huge statue of a woman with a torch in new york
steam: the hot mist that rises from boiling water
steamy: full of steam
stethoscope: an instrument with which a doctor listens to the heart
stop: to come to an end or stand still
suit: a jacket and trousers of the same cloth
sun: the star that gives the earth light and heat
sunflower: a tall plant with a large yellow flower head
sweet: tasting of sugar
taurus: the bull, second sign of the zodiac
tear: a drop of salty water from the eye
tears: drops of salty water from the eyes
television: a device that shows moving pictures and sound
ten: the number after nine
thirty: the number after twenty-nine
three: the number after two
ticket: a piece of paper that shows you have paid to enter
tiger: a large wild cat of asia with orange and black stripes
toilet: a bowl with a seat, flushed with water
tone: a shade of color
tongue: the soft organ in the mouth used for tasting and licking
tooth: one of the hard white things in the mouth used for biting
top: the highest part
tornado: a violent storm with a spinning funnel of air
track: a path or rails along which things run
traffic: the cars and people that move along the streets
train: a line of railway cars pulled by a locomotive
tram: an electric car that runs on rails in city streets
transgender: having a gender other than the one given at birth
troll: a hairy creature of legend that lives in caves or under bridges
tulip: a spring flower shaped like a cup
turban: a long cloth wound around the head
twelve: the number after eleven
two: the number after one
type: a kind of thing
umbrella: a folding cover that protects from rain
vacancy: an empty room or place
veil: a thin cloth that covers the face
virgo: the maiden, sixth sign of the zodiac
volume: how loud a sound is
walking: moving on foot
waning: growing smaller, of the moon
water: the clear liquid that falls as rain and fills the seas
water buffalo: a large horned buffalo of asia kept for work and milk
water closet: a small room with a toilet
watermelon: a large green fruit with red juicy flesh
waxing: growing larger, of the moon
wearing: having clothes on the body
weary: very tired
wedding: the ceremony at which two people are married
whale: a huge sea animal that breathes air
white: of the color of snow
worm: a small animal with a long soft body and no legs
yellow: of the color of lemons
yen: the money of japan
zombie: a dead body that has come back to life
"""

OWN_GLOSSES: dict[str, str] = {
    word: gloss for word, _, gloss in (line.partition(": ") for line in _LINES.splitlines())
}
