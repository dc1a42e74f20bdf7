"""The web console: server-rendered pages under /console that call the same functions as the REST routes."""
