CREATE TABLE outbox_message (
    position INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
    id CHAR(32) NOT NULL, 
    bucket SMALLINT NOT NULL, 
    topic VARCHAR(255) NOT NULL, 
    "key" VARCHAR(255), 
    type VARCHAR(255), 
    payload BLOB, 
    content_type VARCHAR(255), 
    headers TEXT, 
    created_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    CONSTRAINT outbox_message_bucket_check CHECK (bucket BETWEEN 0 AND 63)
);

CREATE TABLE outbox_scheduled (
    id CHAR(32) NOT NULL, 
    bucket SMALLINT NOT NULL, 
    topic VARCHAR(255) NOT NULL, 
    "key" VARCHAR(255), 
    type VARCHAR(255), 
    payload BLOB, 
    content_type VARCHAR(255), 
    headers TEXT, 
    created_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    deliver_at DATETIME NOT NULL, 
    CONSTRAINT outbox_scheduled_pkey PRIMARY KEY (id), 
    CONSTRAINT outbox_scheduled_bucket_check CHECK (bucket BETWEEN 0 AND 63)
);

CREATE INDEX outbox_scheduled_deliver_at_idx ON outbox_scheduled (deliver_at);

CREATE TABLE outbox_parked (
    position BIGINT NOT NULL, 
    id CHAR(32) NOT NULL, 
    bucket SMALLINT NOT NULL, 
    topic VARCHAR(255) NOT NULL, 
    "key" VARCHAR(255), 
    type VARCHAR(255), 
    payload BLOB, 
    content_type VARCHAR(255), 
    headers TEXT, 
    created_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    role VARCHAR(8) NOT NULL, 
    attempts INTEGER DEFAULT 0 NOT NULL, 
    next_attempt_at DATETIME, 
    first_failed_at DATETIME, 
    last_failed_at DATETIME, 
    last_error TEXT, 
    CONSTRAINT outbox_parked_pkey PRIMARY KEY (position)
);

CREATE INDEX outbox_parked_due_idx ON outbox_parked (role, next_attempt_at);

CREATE INDEX outbox_parked_key_idx ON outbox_parked (topic, "key", position);

CREATE TABLE outbox_dead_letter (
    id CHAR(32) NOT NULL, 
    consumer VARCHAR(128) NOT NULL, 
    message_id CHAR(32) NOT NULL, 
    cycle INTEGER NOT NULL, 
    topic VARCHAR(255) NOT NULL, 
    partition INTEGER, 
    "offset" BIGINT, 
    bucket SMALLINT, 
    "key" VARCHAR(255), 
    raw_key BLOB, 
    type VARCHAR(255), 
    payload BLOB, 
    content_type VARCHAR(255), 
    headers TEXT, 
    created_at DATETIME, 
    reason VARCHAR(32) NOT NULL, 
    exception_type VARCHAR(255), 
    exception_message TEXT, 
    stack TEXT, 
    fingerprint VARCHAR(16) NOT NULL, 
    attempts INTEGER NOT NULL, 
    first_failed_at DATETIME, 
    dead_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    app_version VARCHAR(64), 
    state VARCHAR(16) NOT NULL, 
    closed_at DATETIME, 
    edited_from CHAR(32), 
    CONSTRAINT outbox_dead_letter_pkey PRIMARY KEY (id), 
    CONSTRAINT outbox_dead_letter_key UNIQUE (consumer, message_id, cycle)
);

CREATE INDEX outbox_dead_letter_state_idx ON outbox_dead_letter (state, fingerprint, dead_at);

CREATE TABLE outbox_audit (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
    at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    action VARCHAR(32) NOT NULL, 
    who VARCHAR(255) NOT NULL, 
    why TEXT, 
    target TEXT NOT NULL, 
    count INTEGER NOT NULL
);

CREATE TABLE outbox_inbox (
    consumer VARCHAR(128) NOT NULL, 
    message_id CHAR(32) NOT NULL, 
    outcome VARCHAR(8) NOT NULL, 
    cycle INTEGER DEFAULT 0 NOT NULL, 
    processed_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    CONSTRAINT outbox_inbox_pkey PRIMARY KEY (consumer, message_id)
);

CREATE INDEX outbox_inbox_processed_at_idx ON outbox_inbox (processed_at);

CREATE TABLE outbox_attempt (
    consumer VARCHAR(128) NOT NULL, 
    message_id CHAR(32) NOT NULL, 
    cycle INTEGER DEFAULT 0 NOT NULL, 
    topic VARCHAR(255) NOT NULL, 
    partition INTEGER, 
    "offset" BIGINT, 
    "key" VARCHAR(255), 
    sequence BIGINT, 
    attempts INTEGER DEFAULT 0 NOT NULL, 
    state VARCHAR(16) NOT NULL, 
    next_attempt_at DATETIME, 
    first_failed_at DATETIME, 
    last_failed_at DATETIME, 
    last_error TEXT, 
    type VARCHAR(255), 
    payload BLOB, 
    content_type VARCHAR(255), 
    headers TEXT, 
    created_at DATETIME, 
    CONSTRAINT outbox_attempt_pkey PRIMARY KEY (consumer, message_id)
);

CREATE INDEX outbox_attempt_due_idx ON outbox_attempt (consumer, state, next_attempt_at);

CREATE INDEX outbox_attempt_sequence_idx ON outbox_attempt (consumer, "key", sequence);

CREATE TABLE outbox_sent (
    position BIGINT NOT NULL, 
    id CHAR(32) NOT NULL, 
    topic VARCHAR(255) NOT NULL, 
    partition INTEGER, 
    "offset" BIGINT, 
    sent_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    CONSTRAINT outbox_sent_pkey PRIMARY KEY (position)
);

CREATE INDEX outbox_sent_id_idx ON outbox_sent (id);

CREATE INDEX outbox_sent_sent_at_idx ON outbox_sent (sent_at);

CREATE TABLE outbox_lease (
    bucket SMALLINT NOT NULL, 
    owner VARCHAR(128), 
    epoch BIGINT DEFAULT 0 NOT NULL, 
    expires_at DATETIME, 
    transactional_id VARCHAR(255), 
    fence_pending TEXT, 
    CONSTRAINT outbox_lease_pkey PRIMARY KEY (bucket)
);

CREATE TABLE outbox_relay (
    owner VARCHAR(128) NOT NULL, 
    host VARCHAR(255) NOT NULL, 
    version VARCHAR(64) NOT NULL, 
    started_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    heartbeat_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    state TEXT, 
    CONSTRAINT outbox_relay_pkey PRIMARY KEY (owner)
);

CREATE TABLE outbox_checkpoint (
    name VARCHAR(128) NOT NULL, 
    value TEXT NOT NULL, 
    updated_at DATETIME DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')) NOT NULL, 
    CONSTRAINT outbox_checkpoint_pkey PRIMARY KEY (name)
);

INSERT INTO outbox_checkpoint (name, value) VALUES ('outbox_id', lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-a' || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))), ('buckets', '64');

INSERT INTO outbox_lease (bucket) VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9), (10), (11), (12), (13), (14), (15), (16), (17), (18), (19), (20), (21), (22), (23), (24), (25), (26), (27), (28), (29), (30), (31), (32), (33), (34), (35), (36), (37), (38), (39), (40), (41), (42), (43), (44), (45), (46), (47), (48), (49), (50), (51), (52), (53), (54), (55), (56), (57), (58), (59), (60), (61), (62), (63);

DELETE FROM outbox_checkpoint WHERE outbox_checkpoint.name = 'schema_version';

INSERT INTO outbox_checkpoint (name, value) VALUES ('schema_version', '1');
