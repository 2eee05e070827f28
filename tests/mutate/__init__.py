"""Mutation testing: would the tests notice if the code were wrong?

    make mutate ARGS='--area sql --seed 7 --number 40'

Draws small changes of the code (``mutants``), made by our own operators for SQL (``sql``) and by
those of mutmut and Stryker for Python and JavaScript (``others``); runs the tests against each in a
copy of the tree (``trials``); and reports those that no test has noticed (``report``).
"""
