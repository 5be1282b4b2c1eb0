"""Campaigns that put the program under faults and count how it answers."""
