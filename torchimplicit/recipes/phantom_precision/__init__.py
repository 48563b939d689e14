"""How precise phantom gradients are: Figs. 1 and 2 of Geng et al. (2021, arXiv 2111.05177), and beyond the paper.

Fig. 1, a synthetic layer, is the recipe ``phantom-layer``; Fig. 2, along the training of an MDEQ, ``phantom-training``.
"""
