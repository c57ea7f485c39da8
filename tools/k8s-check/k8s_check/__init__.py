"""`make k8s-check`: what the manifests in deploy/k8s say, judged by Kubernetes' schemas, by the restricted profile
of Pod Security, and by the code: its settings, ports, routes, and which service talks to which.
"""
