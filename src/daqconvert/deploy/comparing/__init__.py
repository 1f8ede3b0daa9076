"""How two models are compared, in any runtime: codes and outputs layer by layer, classes, and time.

`probes` records what the layers of a model or of an ONNX file compute, `agreement` sums up differences over batches,
`verifying` holds the verb `verify`, `export_report` and `verify_report` hold what the verbs `export` and `verify`
return, `timing` measures latency.
"""
