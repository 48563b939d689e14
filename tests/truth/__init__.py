"""Random problems, solved and differentiated by the library and by dense float64 algebra: right, or said.

A :class:`~tests.truth.case.Case` says in words what is tried; it becomes tensors (``data``) of a map or an energy
(``cores``), is written down as a user would write it (``trees``, ``styles``, ``statement``), solved in one of the ways
of differentiating (``modes``), and held against ``reference``. ``judge`` says what came out: right, said, or wrong.

    python -m tests.truth --cases 5000 --seed 1
"""
