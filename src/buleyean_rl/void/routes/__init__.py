"""The page's interface over HTTP: a file a part of the page, JSON in and out, and two streams of events."""
