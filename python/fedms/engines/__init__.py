"""Engines carry messages between the server and its clients. They know no method, and methods know no engine."""
