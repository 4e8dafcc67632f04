"""Serving: a durable queue of jobs, a service that draws those of many users together, and doors to it over HTTP."""
