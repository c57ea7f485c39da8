"""Response bodies of the API, and their descriptions in the OpenAPI document: one module per topic."""
