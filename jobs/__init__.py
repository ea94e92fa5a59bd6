"""The domain that server and worker share: what a job is, and how it changes.

Rows change only through `submission.py` (creation), `lifecycle.py` (status, lease) and `eventlog.py` (journal, metrics,
checkpoints); `reads.py` only reads. The row is the truth; a broker message is a doorbell (`dispatch.py`).
"""
