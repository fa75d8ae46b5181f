"""The protocol between a server and its clients, as plain data: messages, visits, admission, aggregation."""
