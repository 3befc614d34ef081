"""The rules: what an onboarding session is and what may happen to it. Pure; no I/O, no clock."""
