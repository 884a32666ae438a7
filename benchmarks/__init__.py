"""
What tcpsvc costs, beside others: ``python -m benchmarks`` measures it.

:mod:`benchmarks.catalog` says what is measured and against whom,
:mod:`benchmarks.measure` how, and :mod:`benchmarks.report` and
:mod:`benchmarks.chart` make a table and a picture of the results. The servers are in
``servers``, and the clients in ``load.c``.
"""
