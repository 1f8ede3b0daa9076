"""How two models are compared, whatever runs them: codes and outputs layer by layer, classes, and time.

`probes` watch the layers of a model or of an ONNX file, `agreement` sums up differences over batches, `verifying`
holds the verb `verify`, `export_report` and `verify_report` are what the two verbs return, `timing` measures latency.
"""
