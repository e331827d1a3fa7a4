"""The attack demo: one image, two models side by side, and an attacker who may move each pixel a little.

    shelf      the models on offer
    pictures   image files, whole levels, and the way between them
    attack     one adversarial image for one model
    contest    one image against two models
    words      what the page says in sentences
    fragments  its HTML, from `templates/`
    handlers   what its endpoints answer
    duel       the parts of the page on which two models stand side by side
    page       the whole page, and how it is served

Only the last three know gradio. Unlike the rest of `serving` this room needs torch: a white-box attack follows
gradients. See docs/demo.md.
"""

import os

# gradio reads this when it is imported; without it, it reports each start to its makers
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
