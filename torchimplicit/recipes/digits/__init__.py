"""A small convolutional equilibrium classifier of scikit-learn's 8×8 digits: ``demo`` and ``digits``.

One config serves both. It trains one classifier for each gradient estimator, side by side: from the same initial
weights, on the same batches in the same order, each step of one beside the same step of the others, so that whatever
else the machine does slows all alike.
"""
