"""Language modelling with the DEQ transformer: WikiText-2 and WikiText-103, word by word."""
