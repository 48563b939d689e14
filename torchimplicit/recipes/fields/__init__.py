"""Fits of a function of coordinates to a signal, by an implicit representation or its explicit twin.

A recipe of this family brings three things: its settings, among them a :class:`.settings.Representation`; the signal,
as :class:`.points.Points` with its splits; and what it shows of a fit. :class:`.task.FieldTask` trains it, and
:class:`.runner.FieldRunner` lets it show the best weights.
"""
