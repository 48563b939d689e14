"""Published tables and figures, reproduced: many runs of recipes, gathered into one record.

A table's settings hold a :class:`.settings.Plan` under the name ``plan``, beside their own; its runner is a
:class:`.runner.Reproduction`: the jobs that the settings ask for, and the record that their results make. A record
(:mod:`.record`) is plain data with figures beside it, from which the page in the run's directory and the page in the
documentation are both made.
"""
