"""Golden results: what was measured once and accepted by a person; and did anything move since?"""
