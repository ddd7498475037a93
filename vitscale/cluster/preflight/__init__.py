"""Whether hosts can run a job together, found in seconds before they try.

facts.py collects what one host says of itself, rounds.py lets all hosts hear all answers,
compare.py says what does not fit together. The last is plain values in, sentences out.
"""
