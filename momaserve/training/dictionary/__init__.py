"""The illustrated dictionary: emoji pictures, their names and short glosses of their words.

Everything is read from three Debian packages (fonts-noto-color-emoji, unicode-cldr-core,
wordnet-base), so the data of the demo checkpoint can be rebuilt bit for bit without a network.
"""
