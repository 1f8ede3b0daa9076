"""Deployment: a frozen model as an ONNX file of packed codes, checked in ONNX Runtime; comparison of any two models.

From the bottom up: `operators` (a frozen layer as three operators while torch exports it), `lowering` (torch to an
ONNX graph of those operators), `expansion` and `unpacking` (those operators in standard ONNX), `runtime` (ONNX
Runtime), `sites` (names), `probes` (layers' codes and outputs of any kind of model), `agreement`, and the verbs
`export` and `verify` with their `reports`.
"""
