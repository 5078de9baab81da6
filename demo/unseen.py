"""Words and phrasings that never occur in training: the second held-out set consists only of them.

The checker knows these words, so that it can verify the facts that a reply states. Training never draws them.
"""


def words(text: str) -> tuple[str, ...]:
    """Split a text into its words."""
    return tuple(text.split())


NAMES = words(
    """Beatrix Wilhelm Nadia Giulia Bruno Ines Mateo Zoe Arthur Camille Dmitri Freya Gustav Noor Priscilla Rafael Sven
    Tamara Ulrich Xenia"""
)
ITEMS = words(
    """toothbrush sofa kayak umbrella blender drone tent rug candle wallet backpack freezer curtain pillow razor compass
    trumpet grill thermometer stroller"""
)
PROBLEMS = words("mouldy leaking noisy crooked shattered torn burnt wobbly discoloured overheating")
ASKS = words("exchange invoice rebate inspection callback upgrade cancellation")

QUERIES = (
    "Good morning, {name} here. Yesterday our {item} arrived {problem}. {extra}Could someone send a prompt {ask}?",
    "To whom it may concern: the {item} turned out {problem}. {extra}Kindly organise a speedy {ask}. Sincerely, {name}",
    "{extra}We unpacked the {item} and found it {problem}. What about a fast {ask}? Cheers, {name}",
    "They call me {name}. Since Monday the {item} has been {problem}. {extra}A swift {ask} would help.",
    "Hi team, {name} writing. Sadly the {item} looks {problem}. {extra}Let me have an early {ask}, if you can.",
)
EXTRAS = ("My neighbour noticed first.", "We leave on Friday.", "Nobody warned us.", "It cost half a month of wages.")
