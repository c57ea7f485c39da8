"""An HTTP server that behaves like the CSP API, and misbehaves when told to."""
