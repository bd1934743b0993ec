"""The bytes that a training rank holds, by formula."""
