"""The report as a real browser shows it: pictures of it, and what is wrong with it there."""
