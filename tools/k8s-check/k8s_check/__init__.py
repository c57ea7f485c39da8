"""Checks of the manifests in deploy/k8s (`make k8s-check`).

The manifests must match Kubernetes' schemas, the restricted profile of Pod Security and the code: its settings,
ports, routes, and the connections between services.
"""
