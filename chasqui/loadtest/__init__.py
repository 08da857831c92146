"""The load generator behind `chasqui bench`: a gateway's throughput and latency, seen from outside.

`workload` makes the requests, `generator` sends them and records what comes back when, `summary`
turns records into numbers, `report` and `plot` show them. It knows the contract alone.
"""
