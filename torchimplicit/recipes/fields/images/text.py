"""Passages that are drawn as pictures of text."""

TEXTS = (
    "A layer is implicit when its output is the solution of a problem rather than the end of a computation, and it can "
    "be differentiated all the same.",
    "Every point of the plane is asked for a state that its cell leaves where it is. What the state was a step ago is "
    "nearly what it is now.",
    "Letters are edges and little else. A network of slow waves cannot draw them, and one of fast waves fills the gaps "
    "between the samples with noise.",
    "Quartz, jasper and flint were weighed by hand; six of the boxes were lost in the mud, and nobody knew why the "
    "rest had kept so dry.",
)
