"""The load generator of `chasqui bench`, which measures a gateway's throughput and latency.

`workload` makes the requests, `generator` sends them and records the times of their events,
`summary` computes rates and percentiles, `report` and `plot` show them. Only the gRPC API is used.
"""
