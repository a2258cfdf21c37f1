"""The Dash app over a folder of runs.

It holds no page yet: reading a run is `entropylens show`, `entropylens report` and
`entropylens.open_run` for now.
"""
