"""The chat page: a session that knows studies and answers, and a page that shows it."""
