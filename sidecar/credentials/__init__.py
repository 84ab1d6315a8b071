"""With which credential?

Read in this order: `broker` (the way of a credential: lease, use, withdraw, close), `held` (what is known of each lease,
the index of live ones), `minting` (one exchange), `exchangers/` (one file a kind of issuer), `header` (a value as a
header's), `handles` (what the agent sees instead), `renewer` (when one is renewed), `ending` (what follows a drop),
`revoker` (what the issuer is told, and the truth about it), `events` (what the record is told), `config` (the `issuers:`
and `credentials:` sections).
"""
