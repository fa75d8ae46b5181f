"""Differential privacy and secure aggregation for one run; the unit that is protected is a client.

    key_file     the run's secret key on disk; keys and random streams derived from it
    clipping     a client's whole update, clipped and rounded to integers
    noise        exact discrete Gaussian noise from such a stream
    accounting   epsilon of the releases made so far; the noise that a planned run needs for an epsilon
    ledger       privacy.jsonl, written before a model leaves
    member_file  a client's own key for secure sums, and the list of clients that it agreed on
    shamir       secret sharing
    secure_sum   the phases of a masked sum that tolerates clients dropping out

Nothing here imports torch or an engine: updates are numpy vectors, messages are bytes.
"""
